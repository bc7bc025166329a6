"""The flags that say how a command samples: steps, guidance, seed, and the sampler."""

import json
from collections.abc import Callable
from typing import Any

from absl import flags

from jaxalign import system
from jaxalign.cli import command, source
from jaxalign.evaluation import evaluation
from jaxalign.types import Params

_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Denoising steps; 20, or those of the run.")
_GUIDANCE_SCALE = flags.DEFINE_float(
  "guidance_scale", None, "Classifier-free guidance; 1 is none. 5, or that of the run."
)
_ETA = flags.DEFINE_float("eta", None, "DDIM's noise, 0 to 1. 0, or that of the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise; evaluate draws its records with it too.")
_SAMPLER = flags.DEFINE_string(
  "sampler",
  None,
  'chain (the default), best_of_n, or your own function as "package.module:function".',
)
_N = flags.DEFINE_integer("n", None, "With --sampler=best_of_n: samples of which the best is kept.")
_SAMPLER_ARGS = flags.DEFINE_string(
  "sampler_args", None, "With --sampler: its other arguments, as a JSON object."
)
_SAMPLER_REWARD = flags.DEFINE_list(
  "sampler_reward", None, "With --sampler: the reward that it goes by, or several, which are added."
)
flags.DEFINE_alias("reward", "sampler_reward")
command.must_be_finite("guidance_scale", "eta")


def seed() -> int:
  """The value of --seed."""
  return _SEED.value


def process() -> dict[str, Any]:
  """What flags say of the section `process`."""
  given = {"num_steps": _NUM_STEPS.value, "eta": _ETA.value}
  return {name: value for name, value in given.items() if value is not None}


def guidance() -> dict[str, Any]:
  """What flags say of the section `guidance`."""
  return {} if _GUIDANCE_SCALE.value is None else {"scale": _GUIDANCE_SCALE.value}


def load_model() -> tuple[system.System, Params]:
  """The system of --model as the flags want it sampled, and the parameters to sample with."""
  defaults = {"num_steps": 20, "eta": 0.0, "transition": "ddim"}
  return source.load_model({**defaults, **process()}, {"scale": 5.0, **guidance()})


def sampler() -> dict[str, Any] | None:
  """The section `sampler` that flags describe; None if they leave the sampler as it is.

  Raises flags.Error for what belongs to a sampler if none is named, and a reward for the chain.
  """
  of_sampler = {"n": _N, "sampler_args": _SAMPLER_ARGS, "sampler_reward": _SAMPLER_REWARD}
  if _SAMPLER.value is None:
    for name, flag in of_sampler.items():
      if flag.value is not None:
        raise flags.Error(f"--{name}: expected --sampler=NAME with it, such as best_of_n")
    return None
  if _SAMPLER.value == "chain" and _SAMPLER_REWARD.value is not None:
    raise flags.Error("--sampler_reward: expected another sampler; the chain goes by no reward")
  section = {"name": _SAMPLER.value, **_given_args()}
  return section if _N.value is None else {**section, "n": _N.value}


def sampler_rewards() -> list[str]:
  """The names that --sampler_reward gives."""
  return _SAMPLER_REWARD.value or []


def steered() -> Callable[[system.System], system.System]:
  """`(sys) -> sys`: with the sampler that flags describe."""
  return evaluation.make_steered(sampler(), sampler_rewards())


def _given_args() -> dict[str, Any]:
  text = _SAMPLER_ARGS.value
  if text is None:
    return {}
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError) as error:
    raise flags.Error(f"--sampler_args: expected a JSON object, got {text!r}") from error
