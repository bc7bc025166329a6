"""Samples from a model, or from a run, steered or not: images of prompts, plans of records.

  python -m jaxalign.sample --model=shapes --prompt="a red circle and a blue square"
  python -m jaxalign.sample --model=shapes --lora=runs/lora/export --prompt="a cross"
  python -m jaxalign.sample --workdir=runs/ddpo --prompt="two rings" --output=pictures
  python -m jaxalign.sample --model=shapes --sampler=best_of_n --n=8 --reward=shapes_learned \
    --prompt="two rings"
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxalign import checks, steering, streams, system
from jaxalign.cli import command, output, paths, sampling, source
from jaxalign.distributed import placement
from jaxalign.modalities.modality import Modality, SampleError
from jaxalign.types import Array, Key, Params, Record

_PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; repeat it for several images.")
_RECORD = flags.DEFINE_multi_string(
  "record", None, "A record as a JSON object, instead of a prompt; repeat it for several samples."
)
_LATENTS = paths.define(
  "latents", None, ".npy with the initial noise, float32 NHWC, one row for each prompt."
)
_OUTPUT_TYPE = flags.DEFINE_enum(
  "output_type", "files", ["files", "npy"], "A file each, PNG for images, or all in one .npy."
)


def main(argv):
  del argv
  records = given_records()
  steered = sampling.steered()  # a mistake in its flags is found before a model is loaded
  sys, params = load_system()
  sys = steered(sys)
  tokens = sys.tokenize(records)
  x_T, key = initial_noise(sys, len(records))
  sample_fn = placement.jit(sys.sample, sys.mesh)
  samples = np.asarray(sample_fn(params, sys.frozen, tokens, x_T, key, sys.pipeline.table).samples)
  if sys.sampler.name != "chain":
    print(steering.in_words(sys.sampler.report()))
  check(samples, sys.model.modality, {**sys.frozen, **params})
  for path in write(samples, output.folder("samples"), sys.model.modality):
    print(path)


def given_records() -> list[Record]:
  """What --prompt and --record ask for."""
  records: list[Record] = [{"prompt": prompt} for prompt in _PROMPT.value or ()]
  for text in _RECORD.value or ():
    try:
      records.append(dict(json.loads(text)))
    except (ValueError, TypeError) as error:
      raise flags.Error(f"--record: expected a JSON object, got {text!r}") from error
  if not records:
    raise flags.Error('expected at least one --prompt="...", or --record=\'{...}\'')
  return records


def load_system() -> tuple[system.System, Params]:
  """The system that the flags describe, and the parameters to sample with."""
  workdir = source.workdir()
  if workdir is not None:
    given = {"process": sampling.process(), "guidance": sampling.guidance()}
    found = source.load_run(workdir, **given)
    return found.system, found.params
  return sampling.load_model()


def initial_noise(sys: system.System, count: int) -> tuple[Array, Key]:
  """x_T `[count, *D]` from --latents or --seed, and the key of the sampler's noise."""
  key_start, key_steps = jax.random.split(streams.stream(sampling.seed(), "sample"))
  shape = (count, *sys.model.latent_shape)
  if _LATENTS.value is None:
    return jax.random.normal(key_start, shape), key_steps
  try:
    x_T = np.load(_LATENTS.value, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise ValueError(f"--latents: could not read {_LATENTS.value} as .npy: {error}") from error
  if x_T.shape != shape or x_T.dtype != np.float32:
    raise ValueError(
      f"--latents: expected float32 {list(shape)} (images NHWC), got {x_T.dtype} {list(x_T.shape)}"
    )
  checks.check_finite("--latents", np.ascontiguousarray(x_T), "draw the noise again")
  return x_T, key_steps


def check(samples: np.ndarray, modality: Modality, params: Params) -> None:
  """Raises ValueError for samples that are not finite, and names the parameter at fault, if any."""
  try:
    modality.check(samples)
  except SampleError as error:
    name = first_not_finite(params)
    if name is None:
      remedy = "all parameters are finite; try a smaller --guidance_scale or --strength"
    else:
      remedy = f"there is NaN or inf in the parameter {name}; take an earlier checkpoint"
    raise ValueError(f"{error}\nnothing is written: {remedy}") from error


def first_not_finite(params: Params) -> str | None:
  """The path of the first array that has a NaN or an inf, each looked at where it lies."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.isfinite(leaf).all():
      return jax.tree_util.keystr(path, simple=True, separator="/")
  return None


def write(samples: np.ndarray, folder: pathlib.Path, modality: Modality) -> list[pathlib.Path]:
  """Writes samples `[M, ...]` as --output_type says, and returns the paths."""
  folder.mkdir(parents=True, exist_ok=True)
  if _OUTPUT_TYPE.value == "npy":
    path = folder / f"{modality.unit}.npy"
    np.save(path, samples)
    return [path]
  return modality.write(samples, folder)


if __name__ == "__main__":
  command.run(main)
