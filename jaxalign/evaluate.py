"""Evaluates a run against its base model, or one model by itself, on held-out prompts.

  python -m jaxalign.evaluate --workdir=runs/ddpo
  python -m jaxalign.evaluate --model=shapes --rewards=shapes_correct --prompts=shapes/held_out
"""

import pathlib

from absl import flags

from jaxalign.cli import command, source
from jaxalign.evaluation import evaluation as evaluation_lib
from jaxalign.evaluation import precision

_REWARDS = flags.DEFINE_list("rewards", None, "Names, comma-separated; or those of the run.")
_PROMPTS = flags.DEFINE_string("prompts", None, "shapes/test, a .txt or .jsonl file, ...")
_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "How many; 96, or as many as the run says.")
_KL = flags.DEFINE_bool("kl", None, "With --workdir: the trajectory KL too, at thrice the cost.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "Denoising steps of --model.")
_GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "Guidance of --model; 1 is none.")
_ETA = flags.DEFINE_float("eta", 0.0, "DDIM's noise of --model, 0 to 1.")
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise, with --model.")
_MICROBATCH = flags.DEFINE_integer("microbatch", 16, "Images sampled at once, with --model.")


def main(argv):
  del argv
  workdir = source.workdir()
  if workdir is not None:
    evaluate_run(workdir)
  else:
    evaluate_model()


def evaluate_run(workdir: pathlib.Path) -> None:
  """Compares a run with its base model on its test prompts, as the run itself does at its end."""
  found = source.load_run(workdir)
  settings = {**found.config["evaluation"], **_given()}
  if _PROMPTS.value is not None:  # all of them, as they are
    settings |= {"validation": "", "every": 0}
  evaluation = evaluation_lib.make_evaluations(**settings).test
  comparison = evaluation.compare_with_base(
    found.system, found.params, kl_floor=precision.recorded_kl(workdir)
  )
  comparison.write(workdir)
  print(comparison.table())


def evaluate_model() -> None:
  """Prints the mean rewards of a model."""
  defaults: dict = {
    "num_samples": 96, "seed": _SEED.value, "microbatch": _MICROBATCH.value, "features": "default"
  }
  if source.model_name() == "shapes":
    defaults |= {"rewards": ["shapes", "shapes_correct"], "source": "shapes/held_out"}
  given = {**defaults, **_given()}
  if "rewards" not in given or "source" not in given:
    raise flags.Error("with --model, expected --rewards=NAME,... and --prompts=NAME_OR_FILE")
  evaluation = evaluation_lib.make_evaluation(**given)
  sys, params = source.load_model(
    {"transition": "ddim", "num_steps": _NUM_STEPS.value, "eta": _ETA.value},
    {"scale": _GUIDANCE_SCALE.value},
  )
  scores = evaluation.run(sys, params)
  for name, mean in scores.means("").items():
    if mean is not None:
      print(f"{name:24}{mean:8.3f}")


def _given() -> dict:
  """The parts of an evaluation that flags name."""
  parts = {"rewards": _REWARDS.value, "source": _PROMPTS.value, "num_samples": _NUM_IMAGES.value}
  parts["kl"] = _KL.value
  return {name: value for name, value in parts.items() if value is not None}


if __name__ == "__main__":
  command.run(main)
