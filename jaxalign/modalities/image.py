"""Images: float32 `[N, H, W, 3]` in [0, 1], drawn in grids and written as PNG; stored as uint8."""

import io
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from jaxalign.modalities.modality import (
  Modality,
  SampleError,
  all_finite,
  check_finite,
  unit_norm,
)

if TYPE_CHECKING:
  from jaxalign.types import Array

MARGIN = 4  # pixels between cells
LINE = 12  # pixels of a line of text
MIN_CELL = 128  # small images are enlarged by a whole factor to at least this many pixels
GRID = 8  # cells of `pixels` along each side


def check(images: np.ndarray) -> None:
  """Raises `SampleError` unless images are finite `[N, H, W, 3]`.

  Without it a NaN image becomes a black one, which the JPEG reward loves.
  """
  _check_shape(images.shape)
  check_finite(images, "images")


def fit(images: "Array") -> "Array":
  """bool `[N]`, in a program: the images that `check` would pass."""
  _check_shape(images.shape)
  return all_finite(images)


def _check_shape(shape: tuple[int, ...]) -> None:
  if len(shape) != 4 or shape[-1] != 3:
    raise SampleError(f"expected images [N, H, W, 3], got shape {shape}")


def pixels(images: np.ndarray) -> np.ndarray:
  """Colours on an 8 x 8 grid around mid-grey: layout and colour, and no network.

  Images whose sides are no multiple of 8 lose their last rows and columns.
  """
  N, H, W, C = images.shape
  h, w = H // GRID, W // GRID
  if not h or not w:
    raise ValueError(f"features: expected images of at least {GRID} x {GRID}, got {H} x {W}")
  blocks = images[:, : h * GRID, : w * GRID].reshape(N, GRID, h, GRID, w, C)
  return unit_norm(blocks.mean(axis=(2, 4)).reshape(N, -1) - 0.5)


def picture(
  images: Sequence[np.ndarray | None], captions: Sequence[str], columns: int
) -> Image.Image:
  """Images `[H, W, 3]` in [0, 1], row by row, each above its caption; a None stays white."""
  height, width = next(image.shape[:2] for image in images if image is not None)
  scale = max(1, -(-MIN_CELL // width))
  height, width = height * scale, width * scale
  rows = -(-len(images) // columns)
  cell_height, cell_width = height + 2 * LINE + MARGIN, width + MARGIN
  canvas = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
  for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
    left, top = index % columns * cell_width, index // columns * cell_height
    if image is not None:
      tile = Image.fromarray(to_uint8(image)).resize((width, height), Image.Resampling.NEAREST)
      canvas.paste(tile, (left, top))
    for number, line in enumerate(_wrap(caption, width, draw, font)[:2]):
      draw.text((left, top + height + number * LINE), line, fill="black", font=font)
  return canvas


def to_uint8(images: np.ndarray) -> np.ndarray:
  """[0, 1] to 0..255, rounded."""
  return np.round(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)


def _wrap(text: str, width: int, draw: ImageDraw.ImageDraw, font) -> list[str]:
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if draw.textlength(longer, font=font) > width and lines[-1]:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def write(images: np.ndarray, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes each image as a PNG, 0000.png and on."""
  paths = [folder / f"{index:04d}.png" for index in range(len(images))]
  for path, image in zip(paths, images, strict=True):
    Image.fromarray(to_uint8(image)).save(path)
  return paths


def read(source: pathlib.Path | bytes) -> np.ndarray:
  """Any file that Pillow reads as uint8 `[H, W, 3]`: turned as its EXIF says, its first frame only.

  What is transparent shows white. Of 16-bit greyscale the upper 8 bits remain.

  Raises:
    ValueError: missing, truncated, no image, or of numbers without a known range.
  """
  name = "the bytes given" if isinstance(source, bytes) else f'"{source}"'
  try:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
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


def resize(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 `[H, W, 3]` as uint8 of that shape, bicubic, whatever its aspect ratio."""
  height, width, _ = shape
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


IMAGES = Modality(
  "images", check, {"pixels": pixels}, picture, write, fit=fit, read=read, resize=resize
)
