"""Samples from a model, or from a run, steered or not: images of prompts, plans of records.

  python -m jaxalign.sample --model=shapes --prompt="a red circle and a blue square"
  python -m jaxalign.sample --model=shapes --lora=runs/lora/export --prompt="a cross"
  python -m jaxalign.sample --workdir=runs/ddpo --prompt="two rings" --output=pictures
  python -m jaxalign.sample --model=shapes --sampler=best_of_n --n=8 --reward=shapes_learned \
    --prompt="two rings"
"""

import json
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxalign import checks, steering, streams, system
from jaxalign.cli import command, output, paths, sampling, source
from jaxalign.diffusion import guidance as guidance_lib
from jaxalign.distributed import placement
from jaxalign.modalities.modality import Modality, SampleError
from jaxalign.types import Array, Key, Params, Record

OUTPUT_TYPES = ("files", "npy")


def define_flags(values: flags.FlagValues) -> None:
  sampling.define(values)
  output.define(values)
  flags.DEFINE_multi_string(
    "prompt", None, "What to draw; repeat it for several images.", flag_values=values
  )
  flags.DEFINE_string(
    "negative_prompt",
    None,
    "What to guide away from, of all images; by default from the empty prompt.",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "record",
    None,
    "A record as a JSON object, instead of a prompt; repeat it for several samples.",
    flag_values=values,
  )
  help = ".npy with the initial noise, float32 NHWC, one row for each prompt."
  paths.define("latents", None, help, flag_values=values)
  flags.DEFINE_enum(
    "output_type",
    "files",
    OUTPUT_TYPES,
    "A file each, PNG for images, or all in one .npy.",
    flag_values=values,
  )


def main(values: flags.FlagValues) -> None:
  records = given_records(values)
  steered = sampling.steered(values)  # a mistake in its flags is found before a model is loaded
  sys, params = load_system(values)
  sys = steered(sys)
  samples = draw(sys, params, records, seed=values.seed, latents=values.latents)
  if sys.sampler.name != "chain":
    print(steering.in_words(sys.sampler.report()))
  folder = output.folder(values, "samples")
  for path in write(samples, folder, sys.model.modality, values.output_type):
    print(path)


def given_records(values: flags.FlagValues) -> list[Record]:
  """What --prompt and --record ask for."""
  records: list[Record] = [{"prompt": prompt} for prompt in values.prompt or ()]
  for text in values.record or ():
    try:
      records.append(dict(json.loads(text)))
    except (ValueError, TypeError) as error:
      raise flags.Error(f"--record: expected a JSON object, got {checks.shown(text)}") from error
  if not records:
    raise flags.Error('expected at least one --prompt="...", or --record=\'{...}\'')
  return records


def load_system(values: flags.FlagValues) -> tuple[system.System, Params]:
  """The system that the flags describe, and the parameters to sample with."""
  if source.workdir(values) is not None:
    given = {"process": sampling.process(values), "guidance": sampling.guidance(values)}
    found = source.load_run(values, **given)
    sys, params = found.system, found.params
  else:
    sys, params = sampling.load_model(values)
  if values.negative_prompt is None:
    return sys, params
  if guidance_lib.count_branches(**sys.guidance) == 1:
    raise flags.Error("--negative_prompt: expected guidance with it, a --guidance_scale above 1")
  try:
    return sys.guided_from({"prompt": values.negative_prompt}), params
  except ValueError as error:  # of a model that reads other fields than a prompt
    raise flags.Error(f"--negative_prompt: expected a model of prompts; {error}") from error


def draw(
  sys: system.System,
  params: Params,
  records: Sequence[Record],
  *,
  seed: int = 0,
  latents: str | os.PathLike | None = None,
) -> np.ndarray:
  """Samples `[M, ...]` of M records, as the command draws them.

  The initial noise is of the seed, or from the .npy file `latents`; that of the steps is of the
  seed. Raises ValueError for samples that are not finite.
  """
  tokens = sys.tokenize(records)
  x_T, key = initial_noise(sys, len(records), seed, latents)
  sample_fn = placement.jit(sys.sample, sys.mesh)
  samples = np.asarray(sample_fn(params, sys.frozen, tokens, x_T, key, sys.pipeline.table).samples)
  check(samples, sys.model.modality, {**sys.frozen, **params})
  return samples


def initial_noise(
  sys: system.System, count: int, seed: int, latents: str | os.PathLike | None
) -> tuple[Array, Key]:
  """x_T `[count, *D]` from the file or the seed, and the key of the sampler's noise."""
  key_start, key_steps = jax.random.split(streams.stream(seed, "sample"))
  shape = (count, *sys.model.latent_shape)
  if latents is None:
    return jax.random.normal(key_start, shape), key_steps
  try:
    x_T = np.load(latents, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise ValueError(f"--latents: could not read {latents} as .npy: {error}") from error
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


def write(
  samples: np.ndarray, folder: str | os.PathLike, modality: Modality, output_type: str = "files"
) -> list[pathlib.Path]:
  """Writes samples `[M, ...]` as one of `OUTPUT_TYPES`, and returns the paths."""
  checks.check_choice("output_type", output_type, OUTPUT_TYPES)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if output_type == "npy":
    path = folder / f"{modality.unit}.npy"
    np.save(path, samples)
    return [path]
  return modality.write(samples, folder)


if __name__ == "__main__":
  command.run(main, define_flags)
