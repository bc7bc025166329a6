"""Everything that an update depends on, and that a checkpoint therefore holds."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
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
  heads: Mapping[str, Params]  # of the method, by name
  heads_opt_state: Mapping[str, Any]
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
  heads: Mapping[str, Params] = MappingProxyType({}),
  heads_tx: Mapping[str, optax.GradientTransformation] = MappingProxyType({}),
  mesh: jax.sharding.Mesh | None = None,
) -> TrainState:
  """The state before the first iteration; its arrays are copies, because updates donate them.

  It is laid out on `mesh`, one device by default; of shapes it is shapes. `heads` are parameters of
  the method's heads and `heads_tx` their optimizers.
  """
  devices = mesh or sharding.one_device()

  def init(params, heads):
    own = {name: jax.tree.map(jnp.copy, params) for name in copies}
    trained, critics = jax.tree.map(jnp.copy, (params, dict(heads)))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=trained,
      opt_state=tx.init(params),
      heads=critics,
      heads_opt_state={name: heads_tx[name].init(head) for name, head in heads.items()},
      copies=own,
      memory=memory,
    )

  fresh = jax.eval_shape(init, params, dict(heads))
  placed = sharding.params(fresh, devices)
  if sharding.is_described(devices):
    return sharding.shaped(fresh, placed)
  return jax.jit(init, out_shardings=placed)(params, dict(heads))


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
