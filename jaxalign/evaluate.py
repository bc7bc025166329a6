"""Evaluates a run against its base model, or one model by itself, on held-out prompts.

  python -m jaxalign.evaluate --workdir=runs/ddpo
  python -m jaxalign.evaluate --model=shapes --rewards=shapes_correct --prompts=shapes/held_out
  python -m jaxalign.evaluate --workdir=runs/ddpo --sampler=best_of_n --n=8 \
    --sampler_reward=shapes_learned
"""

import pathlib

from absl import flags

from jaxalign import steering
from jaxalign.cli import command, paths, sampling, source
from jaxalign.evaluation import evaluation as evaluation_lib
from jaxalign.evaluation import precision
from jaxalign.rewards import retry

_REWARDS = flags.DEFINE_list("rewards", None, "Names, comma-separated; or those of the run.")
_PROMPTS = flags.DEFINE_string("prompts", None, "shapes/test, or a file, folder or pattern.")
_COLUMNS = flags.DEFINE_string(
  "columns", None, "Which column of --prompts is what: prompt=NAME, or the name of a layout."
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many; 96, or as many as the run says.")
_KL = flags.DEFINE_bool("kl", None, "With --workdir: the trajectory KL too, at thrice the cost.")
_MICROBATCH = flags.DEFINE_integer("microbatch", 16, "Images sampled at once, with --model.")


def main(argv):
  del argv
  workdir = source.workdir()
  if workdir is not None:
    evaluate_run(workdir)
  else:
    evaluate_model()


def evaluate_run(workdir: pathlib.Path) -> None:
  """Compares a run with its base model on its test prompts, as the run itself does at its end.

  Both are sampled by --sampler, if it is given.
  """
  for name in ("num_steps", "guidance_scale", "eta", "seed", "microbatch"):
    if flags.FLAGS[name].present:
      raise flags.Error(f"--{name}: expected --model with it; a run is evaluated with its own")
  found = source.load_run(workdir)
  settings = {**found.config["evaluation"], **_given()}
  if _PROMPTS.value is not None:  # all of them, as they are
    settings |= {"validation": "", "every": 0, "columns": _COLUMNS.value}
  asked_again = retry.of_section(found.config.get("reward_pool", {}))
  evaluation = evaluation_lib.make_evaluations(**settings, retry=asked_again).test
  comparison = evaluation.compare_with_base(
    found.system, found.params, kl_floor=precision.recorded_kl(workdir)
  )
  comparison.write(workdir)
  print(comparison.table())


def evaluate_model() -> None:
  """Prints the mean rewards of a model."""
  defaults: dict = {
    "num_samples": 96,
    "seed": sampling.seed(),
    "microbatch": _MICROBATCH.value,
    "features": "default",
  }
  if source.model_name() == "shapes":
    defaults |= {"rewards": ["shapes", "shapes_correct"], "source": "shapes/held_out"}
  given = {**defaults, **_given()}
  if "rewards" not in given or "source" not in given:
    raise flags.Error("with --model, expected --rewards=NAME,... and --prompts=NAME_OR_FILE")
  evaluation = evaluation_lib.make_evaluation(**given)
  sys, params = sampling.load_model()
  scores = evaluation.run(sys, params)
  if evaluation.steered(sys) is not sys:
    print(steering.in_words(evaluation.steered(sys).sampler.report()))
  for name, mean in scores.means("").items():
    if mean is not None:
      print(f"{name:24}{mean:8.3f}")
  for name, count in scores.abstained.items():
    if count:
      print(f"{name}: no verdict on {count} of {len(scores.samples)}")


def _given() -> dict:
  """The parts of an evaluation that flags name; flags.Error for one that goes with another."""
  if _COLUMNS.value is not None and _PROMPTS.value is None:
    raise flags.Error("--columns: expected --prompts with it")
  parts = {
    "rewards": _REWARDS.value,
    "source": None if _PROMPTS.value is None else paths.of_field(_PROMPTS.value),
    "columns": _COLUMNS.value,
    "num_samples": _NUM_IMAGES.value,
    "kl": _KL.value,
    "sampler": sampling.sampler(),
    "sampler_rewards": sampling.sampler_rewards() or None,
  }
  return {name: value for name, value in parts.items() if value is not None}


if __name__ == "__main__":
  command.run(main)
