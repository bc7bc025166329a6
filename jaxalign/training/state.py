"""Everything that an update depends on, and that a checkpoint therefore holds."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.distributed import placement, sharding
from jaxalign.types import Array, Params

AVERAGE = "ema"  # the copy that is evaluated, sampled and exported, where there is one


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
  copies: Mapping[str, Params]  # of params, by name: the average and what the method asks for
  memory: Any  # what labels remember; None where that is nothing

  @property
  def sampling_params(self) -> Params:
    """What evaluation samples with: the average if there is one."""
    return self.copies.get(AVERAGE, self.params)


def init_state(
  params: Params,
  tx: optax.GradientTransformation,
  memory: Any = None,
  *,
  copies: Iterable[str] = (),
  mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
  """The state before the first iteration; its arrays are copies, because updates donate them.

  It is laid out on `mesh`, one device by default; of shapes it is shapes.
  """
  devices = mesh or sharding.one_device()

  def init(params):
    own = {name: jax.tree.map(jnp.copy, params) for name in copies}
    trained = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(params), own, memory)

  fresh = jax.eval_shape(init, params)
  placed = sharding.params(fresh, devices)
  if sharding.is_described(devices):
    return sharding.shaped(fresh, placed)
  return jax.jit(init, out_shardings=placed)(params)


def jit_end(mesh: jax.sharding.Mesh, state_shardings: Any) -> Callable[..., TrainState]:
  """Jitted `(state, decays {name: float}) -> state` at the end of an iteration. Donates the state.

  It counts the iteration, and each copy becomes `decay * copy + (1 - decay) * params`.
  """

  def end(state: TrainState, decays: Mapping[str, Array]) -> TrainState:
    def follow(decay):
      return lambda old, new: decay * old + (1.0 - decay) * new

    copies = {
      name: jax.tree.map(follow(decays[name]), copy, state.params)
      for name, copy in state.copies.items()
    }
    return dataclasses.replace(state, step=state.step + 1, copies=copies)

  return placement.jit(end, mesh, donate_argnums=0, out_shardings=state_shardings)
