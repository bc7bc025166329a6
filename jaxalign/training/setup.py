"""The parts of a run, assembled once from the sections of a config, for whoever runs it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from jaxalign import checks, methods, streams, system
from jaxalign.distributed import sharding
from jaxalign.labels import advantages
from jaxalign.models.model import Model
from jaxalign.rewards import combine, scoring
from jaxalign.training import optim, update
from jaxalign.training.state import AVERAGE, TrainState, init_state
from jaxalign.types import Params


class Setup(NamedTuple):
  """What training, a dry run and benchmarks share, before anything is sampled or read.

  sections: of the config, for those that own them.
  rewards: None where the config has none; their parameters lie on the mesh.
  tx: the optimizer.
  frozen: an argument of every update: the system's trees, and at "rewards" the parameters of
    rewards that run on the device.
  copies: by name, the decays of the method's copies and of the average, see `methods.Method`.
  """

  sections: Mapping[str, Any]
  system: system.System
  rewards: combine.WeightedRewards | None
  method: methods.Method
  tx: optax.GradientTransformation
  frozen: Mapping[str, Params]
  copies: Mapping[str, Callable[[int], float]]

  def init_state(self, memory: Any = None) -> TrainState:
    """The state before the first iteration; shapes on devices that are only described."""
    sys, heads = self.system, self.method.heads
    made = {
      name: heads[name].init(streams.stream(self.sections["seed"], "heads", number))
      for number, name in enumerate(sorted(heads))
    }
    if sharding.is_described(sys.mesh):
      made = jax.eval_shape(lambda: made)
    return init_state(
      sys.policy.params,
      self.tx,
      memory,
      copies=self.copies,
      heads=made,
      heads_tx=self.heads_tx,
      mesh=sys.mesh,
    )

  @property
  def heads_tx(self) -> dict[str, optax.GradientTransformation]:
    """The optimizers of the method's heads."""
    return {name: optax.adam(head.learning_rate) for name, head in self.method.heads.items()}

  def jit_update(self, state: TrainState, select: update.SelectFn) -> Callable[..., Any]:
    """`update.jit_update` of these parts, for states like this one."""
    sys = self.system
    return update.jit_update(
      self.method,
      self.tx,
      sys.policy.variables,
      select,
      heads_tx=self.heads_tx,
      mesh=sys.mesh,
      state_shardings=sharding.params(state, sys.mesh),
      ready_fn=sys.policy.ready,
    )

  def decays(self, iteration: int) -> dict[str, float]:
    """Of every copy, at the end of an iteration."""
    return {name: float(decay(iteration)) for name, decay in self.copies.items()}


def assemble(
  sections: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None = None,
  *,
  model: Model | None = None,
  shapes_only: bool = False,
) -> Setup:
  """Opens the model and makes the method of a config.

  Args:
    sections: the config.
    mesh: one device by default.
    model: in the place of the one that the section `model` names.
    shapes_only: parameters of rewards are shapes too, for programs that are compiled and not run.

  Raises:
    ValueError: a section that is missing, or does not fit its owner.
  """
  section = functools.partial(checks.call_section, sections)
  mesh = mesh or sharding.one_device()
  rewards = None
  if "reward" in sections:
    # On the mesh once, whoever scores with them: the sampler, the update, the feed, evaluations.
    made = section("reward", combine.make_total, shapes_only=shapes_only)
    rewards = scoring.placed(made, mesh)
  # The chain goes by no reward, and other samplers by those of the run.
  sampler = sections.get("sampler", system.CHAIN)
  ranking = None if sampler == system.CHAIN else rewards
  if model is None:
    sys = system.from_config(sections, mesh, ranking)
  else:
    own = {name: sections[name] for name in ("lora", "process", "guidance")}
    own |= {"sampler": sampler, "rewards": ranking}
    sys = system.from_model(model, seed=sections["seed"], mesh=mesh, **own)
  method = _make_method(sections, sys.pipeline_with(rewards))
  frozen = dict(sys.frozen)
  if rewards is not None and rewards.params:
    # An argument of the update: captured, it would be a constant of the program.
    frozen["rewards"] = rewards.params
  copies = _copies(method, sections.get("ema_decay", 0.0))
  return Setup(sections, sys, rewards, method, section("optim", optim.make), frozen, copies)


def _make_method(sections: Mapping[str, Any], pipeline) -> methods.Method:
  """The section `method`, with the estimator of the section `advantage` where there is one."""
  given: dict[str, Any] = {"pipeline": pipeline}
  if "advantage" in sections:
    given["advantage"] = checks.call_section(sections, "advantage", advantages.make)
  return checks.call_section(sections, "method", methods.make, **given)


def _copies(method: methods.Method, ema_decay: float) -> dict[str, Callable[[int], float]]:
  """Those of the method, and the average that the config asks for."""
  if AVERAGE in method.copies:
    raise ValueError(
      f"config.method: expected copies of other names than {AVERAGE!r}, which is the average of "
      "config.ema_decay; found one that is called so"
    )
  average = {AVERAGE: lambda iteration: ema_decay} if ema_decay > 0 else {}
  return {**method.copies, **average}
