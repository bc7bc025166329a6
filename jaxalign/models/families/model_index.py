"""model_index.json as it is written; `identity.classes` reads it."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.identity import classes

FILE = classes.INDEX
_DIFFUSERS = ("unet", "vae")  # the others are transformers' own
_ABSENT = ("feature_extractor", "image_encoder")


def default(two_text_encoders: bool) -> dict[str, Any]:
  """The class and the settings of a pipeline that was built rather than read."""
  if two_text_encoders:
    return {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
  return {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}


def make(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The content of the file, from the settings `configs["pipeline"]` and what else there is."""
  scheduler = configs["scheduler"]
  if "_class_name" not in scheduler:
    raise ValueError("expected '_class_name' in the scheduler config, e.g. 'DDIMScheduler'")
  two = "text_encoder_2" in configs
  entries = {
    **{name: [None, None] for name in (_ABSENT if two else (*_ABSENT, "safety_checker"))},
    **{
      name: ["diffusers" if name in _DIFFUSERS else "transformers", names[0]]
      for name, names in classes.COMPONENTS.items()
      if two or name not in classes.SECOND
    },
    "scheduler": ["diffusers", scheduler["_class_name"]],
    **configs["pipeline"],
  }
  version = {"_diffusers_version": "0.30.0"}
  return dict(sorted({**entries, **version}.items()))
