"""The flags that say how a command samples: steps, guidance, seed, and the sampler."""

import functools
import json
from collections.abc import Callable
from typing import Any

from absl import flags

from jaxalign import system
from jaxalign.cli import command, source
from jaxalign.evaluation import evaluation
from jaxalign.types import Params


def define(values: flags.FlagValues) -> None:
  """Defines the flags, and those of `source`."""
  source.define(values)
  define_integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  define_integer("num_steps", None, "Denoising steps; 20, or those of the run.")
  flags.DEFINE_float(
    "guidance_scale",
    None,
    "As the model's own pipeline means it; of classifier-free guidance 1 is none. What its makers "
    "take, or that of the run.",
    flag_values=values,
  )
  flags.DEFINE_float(
    "eta", None, "DDIM's noise, 0 to 1. 0, or that of the run.", flag_values=values
  )
  define_integer("seed", 0, "Of the noise; evaluate draws its records with it too.")
  flags.DEFINE_string(
    "sampler",
    None,
    'chain (the default), best_of_n, or your own function as "package.module:function".',
    flag_values=values,
  )
  define_integer("n", None, "With --sampler=best_of_n: samples of which the best is kept.")
  flags.DEFINE_string(
    "sampler_args",
    None,
    "With --sampler: its other arguments, as a JSON object.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "sampler_reward",
    None,
    "With --sampler: the reward that it goes by, or several, which are added.",
    flag_values=values,
  )
  flags.DEFINE_alias("reward", "sampler_reward", flag_values=values)
  command.must_be_finite(values, "guidance_scale", "eta")


def process(values: flags.FlagValues) -> dict[str, Any]:
  """What flags say of the section `process`."""
  given = {"num_steps": values.num_steps, "eta": values.eta}
  return {name: value for name, value in given.items() if value is not None}


def guidance(values: flags.FlagValues) -> dict[str, Any]:
  """What flags say of the section `guidance`."""
  return {} if values.guidance_scale is None else {"scale": values.guidance_scale}


def load_model(values: flags.FlagValues) -> tuple[system.System, Params]:
  """The system of --model as the flags want it sampled, and the parameters to sample with."""
  defaults = {"num_steps": 20, "eta": 0.0, "transition": "ddim"}
  return source.load_model(values, {**defaults, **process(values)}, guidance(values))


def sampler(values: flags.FlagValues) -> dict[str, Any] | None:
  """The section `sampler` that flags describe; None if they leave the sampler as it is.

  Raises flags.Error for what belongs to a sampler if none is named, and a reward for the chain.
  """
  if values.sampler is None:
    for name in ("n", "sampler_args", "sampler_reward"):
      if values[name].value is not None:
        raise flags.Error(f"--{name}: expected --sampler=NAME with it, such as best_of_n")
    return None
  if values.sampler == "chain" and values.sampler_reward is not None:
    raise flags.Error("--sampler_reward: expected another sampler; the chain goes by no reward")
  section = {"name": values.sampler, **_given_args(values.sampler_args)}
  return section if values.n is None else {**section, "n": values.n}


def sampler_rewards(values: flags.FlagValues) -> list[str]:
  """The names that --sampler_reward gives."""
  return values.sampler_reward or []


def steered(values: flags.FlagValues) -> Callable[[system.System], system.System]:
  """`(sys) -> sys`: with the sampler that flags describe."""
  return evaluation.make_steered(sampler(values), sampler_rewards(values))


def _given_args(text: str | None) -> dict[str, Any]:
  if text is None:
    return {}
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError) as error:
    raise flags.Error(f"--sampler_args: expected a JSON object, got {text!r}") from error
