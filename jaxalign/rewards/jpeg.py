"""Size of the image as a JPEG file: the rewards of DDPO that need no network.

Black et al. 2023 (arXiv:2305.13301): Pillow at quality 95 with its default options, in
kilobytes of 1000 bytes. The last bytes depend on the libjpeg that Pillow was built with.
"""

import io
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from PIL import Image

from jaxalign.rewards.contract import Record, RewardFn

QUALITY = 95


def make_compressibility() -> RewardFn:
  """The negative of the file size in kB: smooth images score high."""
  return lambda images, records: -_sizes(images, records)


def make_incompressibility() -> RewardFn:
  """The file size in kB: busy images score high."""
  return _sizes


def _sizes(images: np.ndarray, records: Sequence[Record]) -> np.ndarray:
  del records  # the size does not depend on what was asked for
  with futures.ThreadPoolExecutor() as pool:  # Pillow lets go of the GIL while it encodes
    return np.array(list(pool.map(_size_in_kb, images)), np.float32)


def _size_in_kb(image: np.ndarray) -> float:
  pixels = np.clip(np.round(image * 255.0), 0.0, 255.0).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="JPEG", quality=QUALITY)
  return file.tell() / 1000.0
