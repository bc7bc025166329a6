"""Samples from a model, or from a run: images of prompts, plans of records.

  python -m jaxalign.sample --model=shapes --prompt="a red circle and a blue square"
  python -m jaxalign.sample --model=shapes --lora=runs/lora/export --prompt="a cross"
  python -m jaxalign.sample --workdir=runs/ddpo --prompt="two rings" --output=pictures
"""

import json
import pathlib

import jax
import numpy as np
from absl import flags

from jaxalign import streams, system
from jaxalign.cli import command, source
from jaxalign.distributed import placement
from jaxalign.modalities.modality import Modality
from jaxalign.types import Array, Key, Params, Record

_PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; repeat it for several images.")
_RECORD = flags.DEFINE_multi_string(
  "record", None, "A record as a JSON object, instead of a prompt; repeat it for several samples."
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Denoising steps; 20, or those of the run.")
_GUIDANCE_SCALE = flags.DEFINE_float(
  "guidance_scale", None, "Classifier-free guidance; 1 is none. 5, or that of the run."
)
_ETA = flags.DEFINE_float("eta", None, "DDIM's noise, 0 to 1. 0, or that of the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the initial noise and of the sampler's.")
_LATENTS = flags.DEFINE_string(
  "latents", None, ".npy with the initial noise, float32 NHWC, one row for each prompt."
)
_OUTPUT = flags.DEFINE_string("output", "samples", "Folder to write to; made if needed.")
_OUTPUT_TYPE = flags.DEFINE_enum(
  "output_type", "files", ["files", "npy"], "A file each, PNG for images, or all in one .npy."
)


def main(argv):
  del argv
  records = given_records()
  sys, params = load_system()
  tokens = sys.model.tokenize(records)
  x_T, key = initial_noise(sys, len(records))
  sample_fn = placement.jit(sys.sample, sys.mesh)
  samples = np.asarray(sample_fn(params, sys.frozen, tokens, x_T, key, sys.pipeline.table).samples)
  for path in write(samples, pathlib.Path(_OUTPUT.value), sys.model.modality):
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
  process, guidance = _given_process(), _given_scale()
  workdir = source.workdir()
  if workdir is not None:
    found = source.load_run(workdir, process=process, guidance=guidance)
    return found.system, found.params
  defaults = {"num_steps": 20, "eta": 0.0, "transition": "ddim"}
  return source.load_model({**defaults, **process}, {"scale": 5.0, **guidance})


def _given_process() -> dict:
  flags_given = {"num_steps": _NUM_STEPS.value, "eta": _ETA.value}
  return {name: value for name, value in flags_given.items() if value is not None}


def _given_scale() -> dict:
  return {} if _GUIDANCE_SCALE.value is None else {"scale": _GUIDANCE_SCALE.value}


def initial_noise(sys: system.System, count: int) -> tuple[Array, Key]:
  """x_T `[count, *D]` from --latents or --seed, and the key of the sampler's noise."""
  key_start, key_steps = jax.random.split(streams.stream(_SEED.value, "sample"))
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
  return x_T, key_steps


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
