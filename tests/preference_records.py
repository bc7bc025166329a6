"""Images and preference records made by hand."""

import io

import numpy as np
from PIL import Image

from jaxalign.data import preferences
from jaxalign.data.preferences import make_candidate
from jaxalign.modalities.image import IMAGES

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def solid(colour, size=(4, 6)):
  """The bytes of an image of one colour; size is (height, width)."""
  return encode(Image.new("RGB", size[::-1], colour))


def record(n=None, prompt="a cat", **labels):
  """A record of `n` images, whose grey is their index."""
  labels = {name: np.array(values, np.float32) for name, values in labels.items()}
  n = len(next(iter(labels.values()))) if n is None else n
  candidates = tuple(make_candidate(solid((i, i, i)), IMAGES.read) for i in range(n))
  return preferences.Record({"prompt": prompt}, candidates, **labels)
