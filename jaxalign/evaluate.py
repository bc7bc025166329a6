"""Evaluates a run against its base model, or one model by itself, on held-out prompts.

  python -m jaxalign.evaluate --workdir=runs/ddpo
  python -m jaxalign.evaluate --model=shapes --rewards=shapes_correct --prompts=shapes/held_out
  python -m jaxalign.evaluate --workdir=runs/ddpo --sampler=best_of_n --n=8 \
    --sampler_reward=shapes_learned
"""

import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from absl import flags

from jaxalign import steering, system
from jaxalign.cli import command, paths, sampling, source
from jaxalign.evaluation import comparison as comparison_lib
from jaxalign.evaluation import evaluation as evaluation_lib
from jaxalign.evaluation import precision
from jaxalign.rewards import retry
from jaxalign.training import workdir as workdir_lib
from jaxalign.types import Params


def define_flags(values: flags.FlagValues) -> None:
  sampling.define(values)
  flags.DEFINE_list(
    "rewards", None, "Names, comma-separated; or those of the run.", flag_values=values
  )
  flags.DEFINE_string(
    "prompts", None, "shapes/test, or a file, folder or pattern.", flag_values=values
  )
  flags.DEFINE_string(
    "columns",
    None,
    "Which column of --prompts is what: prompt=NAME, or the name of a layout.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_images", None, "How many; 96, or as many as the run says.", flag_values=values
  )
  flags.DEFINE_bool(
    "kl", None, "With --workdir: the trajectory KL too, at thrice the cost.", flag_values=values
  )
  flags.DEFINE_integer(
    "microbatch", 16, "Images sampled at once, with --model.", flag_values=values
  )


def main(values: flags.FlagValues) -> None:
  workdir = source.workdir(values)
  if workdir is None:
    given = _evaluation_of_model(values)
    evaluation = evaluation_lib.make_evaluation(**given)  # a mistake is found before a model loads
    evaluate_model(*sampling.load_model(values), evaluation)
    return
  for name in ("num_steps", "guidance_scale", "eta", "seed", "microbatch"):
    if values[name].present:
      raise flags.Error(f"--{name}: expected --model with it; a run is evaluated with its own")
  evaluate_run(workdir, **source.state(values), changes=_given(values))


def evaluate_run(
  workdir: str | os.PathLike,
  *,
  take: str = "chosen",
  strength: float = 1.0,
  changes: Mapping[str, Any] = MappingProxyType({}),
) -> comparison_lib.Comparison:
  """Compares a run with its base model on its test prompts, as the run itself does at its end.

  The report goes to `workdir`, and is printed.

  Args:
    workdir: of the run.
    take, strength: see `training.workdir.load`.
    changes: to the section `evaluation` of its config, such as `sampler`.
  """
  workdir = pathlib.Path(workdir)
  found = workdir_lib.load(workdir, take=take, strength=strength)
  print(f"{workdir}: {found.taken}")
  settings = {**found.config["evaluation"], **changes}
  if "source" in changes:  # all of them, as they are
    settings |= {"validation": "", "every": 0, "columns": changes.get("columns")}
  asked_again = retry.of_section(found.config.get("reward_pool", {}))
  evaluation = evaluation_lib.make_evaluations(**settings, retry=asked_again).test
  comparison = evaluation.compare_with_base(
    found.system, found.params, kl_floor=precision.recorded_kl(workdir)
  )
  comparison.write(workdir)
  print(comparison.table())
  return comparison


def evaluate_model(
  sys: system.System, params: Params, evaluation: evaluation_lib.Evaluation
) -> comparison_lib.Scores:
  """Prints the mean rewards of a model, and returns what they are of."""
  scores = evaluation.run(sys, params)
  if evaluation.steered(sys) is not sys:
    print(steering.in_words(evaluation.steered(sys).sampler.report()))
  for name, mean in scores.means("").items():
    if mean is not None:
      print(f"{name:24}{mean:8.3f}")
  for name, count in scores.abstained.items():
    if count:
      print(f"{name}: no verdict on {count} of {len(scores.samples)}")
  return scores


def _evaluation_of_model(values: flags.FlagValues) -> dict[str, Any]:
  """The arguments of `make_evaluation` with --model."""
  defaults: dict = {
    "num_samples": 96,
    "seed": values.seed,
    "microbatch": values.microbatch,
    "features": "default",
  }
  if values.model == "shapes":
    defaults |= {"rewards": ["shapes", "shapes_correct"], "source": "shapes/held_out"}
  given = {**defaults, **_given(values)}
  if "rewards" not in given or "source" not in given:
    raise flags.Error("with --model, expected --rewards=NAME,... and --prompts=NAME_OR_FILE")
  return given


def _given(values: flags.FlagValues) -> dict[str, Any]:
  """The parts of an evaluation that flags name; flags.Error for one that goes with another."""
  if values.columns is not None and values.prompts is None:
    raise flags.Error("--columns: expected --prompts with it")
  parts = {
    "rewards": values.rewards,
    "source": None if values.prompts is None else paths.of_field(values.prompts),
    "columns": values.columns,
    "num_samples": values.num_images,
    "kl": values.kl,
    "sampler": sampling.sampler(values),
    "sampler_rewards": sampling.sampler_rewards(values) or None,
  }
  return {name: value for name, value in parts.items() if value is not None}


if __name__ == "__main__":
  command.run(main, define_flags)
