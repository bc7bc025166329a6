"""Preferences of the embedded world: pairs of images of its model, compared by its judge.

  python -m jaxalign.recipes.shapes_preferences --output=preferences/train
  python -m jaxalign.recipes.shapes_preferences --output=preferences/held_out \
    --split=held_out --seed=1

What is written, and that it is a function of the flags alone, says `preference_pairs`.
"""

import io
import os
from typing import Any

import numpy as np
from PIL import Image

from jaxalign.modalities import image
from jaxalign.recipes import preference_pairs
from jaxalign.types import Record
from jaxalign.worlds.shapes import judge


def generate(
  *,
  output: str | os.PathLike,
  num_pairs: int,
  seed: int,
  temperature: float,
  tie_margin: float,
  guidance_scale: float,
  num_steps: int,
  eta: float,
  microbatch: int,
  split: str,
) -> dict[str, Any]:
  """Writes `num_pairs` pairs, see `preference_pairs.generate`; returns what about.json says."""
  settings = {name: value for name, value in locals().items() if name != "output"}
  process = {"transition": "ddim", "num_steps": num_steps, "eta": eta}
  return preference_pairs.generate(WORLD, output=output, settings=settings, process=process)


def _judge(pair: np.ndarray, record: Record) -> np.ndarray:
  return np.array([judge.judge(image, record["prompt"]).score for image in pair])


def _png(image: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return buffer.getvalue()


WORLD = preference_pairs.World(
  model="shapes",
  columns=("prompt", "images"),
  asked=lambda record: record["prompt"],
  stored=image.to_uint8,
  encode=_png,
  judge=_judge,
)


if __name__ == "__main__":
  preference_pairs.generate_by_flags(
    generate, ["train", "held_out"], temperature=0.1, num_steps=8, microbatch=64, eta=1.0
  )
