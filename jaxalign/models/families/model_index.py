"""model_index.json: which of diffusers' pipelines a folder holds, and of what it is made."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign import files

FILE = "model_index.json"
_ALWAYS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_SECOND = ("text_encoder_2", "tokenizer_2")  # Stable Diffusion XL has both
_FOREIGN = ("text_encoder_3", "transformer", "prior")  # another kind of model, if present

_TOKENIZER = ["transformers", "CLIPTokenizer"]
_CLASSES = {
  "text_encoder": ["transformers", "CLIPTextModel"],
  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
  "tokenizer": _TOKENIZER,
  "tokenizer_2": _TOKENIZER,
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}
_ABSENT = ("feature_extractor", "image_encoder")


def default(two_text_encoders: bool) -> dict[str, Any]:
  """The class and the settings of a pipeline that was built rather than read."""
  if two_text_encoders:
    return {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
  return {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}


def read(folder: pathlib.Path) -> tuple[dict[str, Any], bool]:
  """The pipeline's class and settings, and whether it has two text encoders.

  Raises ValueError unless the folder holds a Stable Diffusion 1.x, 2.x or XL; its UNet may read an
  image too.
  """
  index = files.read_json(folder / FILE)
  present = {name for name, entry in index.items() if isinstance(entry, list) and any(entry)}
  two = not present.isdisjoint(_SECOND)
  missing = sorted({*_ALWAYS, *(_SECOND if two else ())} - present)
  foreign = sorted(present.intersection(_FOREIGN))
  if missing or foreign:
    raise ValueError(
      f"{folder / FILE}: expected a Stable Diffusion 1.x, 2.x or XL pipeline, found "
      f"{index.get('_class_name', 'no class')}"
      + (f" without {', '.join(missing)}" if missing else f" with {', '.join(foreign)}")
    )
  settings = {
    name: value
    for name, value in index.items()
    if not isinstance(value, list) and (name == "_class_name" or not name.startswith("_"))
  }
  if "requires_safety_checker" in settings:
    settings["requires_safety_checker"] = False  # it is not kept
  return settings, two


def make(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The content of the file, from the settings `configs["pipeline"]` and what else there is."""
  scheduler = configs["scheduler"]
  if "_class_name" not in scheduler:
    raise ValueError("expected '_class_name' in the scheduler config, e.g. 'DDIMScheduler'")
  two = "text_encoder_2" in configs
  entries = {
    **{name: [None, None] for name in (_ABSENT if two else (*_ABSENT, "safety_checker"))},
    **{name: entry for name, entry in _CLASSES.items() if two or name not in _SECOND},
    "scheduler": ["diffusers", scheduler["_class_name"]],
    **configs["pipeline"],
  }
  version = {"_diffusers_version": "0.30.0"}
  return dict(sorted({**entries, **version}.items()))
