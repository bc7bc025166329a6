"""Candidate images of stored preferences: files or bytes, decoded when they are wanted."""

import dataclasses
import io
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One image, kept as the file or as the bytes it came in.

  Attributes:
    image: path or content of an image file.
    size: (height, width) of its pixels.
  """

  image: pathlib.Path | bytes = dataclasses.field(repr=False)
  size: tuple[int, int]

  def pixels(self) -> np.ndarray:
    """uint8 `[H, W, 3]`, decoded anew at every call."""
    return decode(self.image)


def make_candidate(image: pathlib.Path | bytes) -> Candidate:
  """Decodes the image once, to know its size and that it is whole; ValueError if it is not."""
  height, width, _ = decode(image).shape
  return Candidate(image, (height, width))


def decode(image: pathlib.Path | bytes) -> np.ndarray:
  """Any file that Pillow reads as uint8 `[H, W, 3]`: turned as its EXIF says, its first frame only.

  What is transparent shows white. Of 16-bit greyscale the upper 8 bits remain.

  Raises:
    ValueError: missing, truncated, no image, or of numbers without a known range.
  """
  name = "the bytes given" if isinstance(image, bytes) else f'"{image}"'
  try:
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
      return _to_rgb(ImageOps.exif_transpose(opened))
  except Exception as error:  # in a broken file Pillow's decoders raise nearly anything
    unknown = isinstance(error, UnidentifiedImageError)
    fault = "of no kind that Pillow knows" if unknown else error
    raise ValueError(f"unreadable image: expected a whole image in {name}: {fault}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
  if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
      raise ValueError(f"expected greyscale of 16 bits, got {values.min()} to {values.max()}")
    return np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=2)
  if image.mode == "F":
    raise ValueError("expected integer pixels, got floating point, whose range is not known")
  if "A" in image.getbands() or "transparency" in image.info:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return np.array(image.convert("RGB"))
