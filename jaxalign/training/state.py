"""Everything that an update depends on, and that a checkpoint therefore holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.distributed import sharding
from jaxalign.labels.advantages import RecordStats
from jaxalign.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state of a run after `step` iterations.

  Random keys and the position in the data are functions of the seed and `step`, so they need no
  place here. The frozen trees never change and are read from the model's folder again.
  """

  step: Array  # [] int32, finished iterations; optimizer steps are counted in opt_state
  params: Params  # the trained tree
  opt_state: Any
  ema_params: Params | None  # None without an average
  stats: RecordStats | None  # running reward statistics; None for estimators without memory

  @property
  def sampling_params(self) -> Params:
    """What evaluation samples with: the average if there is one."""
    return self.params if self.ema_params is None else self.ema_params


def init_state(
  params: Params,
  tx: optax.GradientTransformation,
  stats: RecordStats | None,
  *,
  with_ema: bool,
  mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
  """The state before the first iteration; its arrays are copies, because updates donate them.

  It is laid out on `mesh`, one device by default; of shapes it is shapes.
  """
  devices = mesh or sharding.one_device()

  def init(params):
    ema_params = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(
      jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params), ema_params, stats
    )

  fresh = jax.eval_shape(init, params)
  placed = sharding.params(fresh, devices)
  if sharding.is_described(devices):
    return sharding.shaped(fresh, placed)
  return jax.jit(init, out_shardings=placed)(params)
