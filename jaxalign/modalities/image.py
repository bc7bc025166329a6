"""Images: float32 `[N, H, W, 3]` in [0, 1], drawn in grids and written as PNG; stored as uint8."""

import io
import pathlib
import struct
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
PNG = b"\x89PNG\r\n\x1a\n"  # that such a file begins with
CHUNK = 12  # bytes of a chunk of PNG beside its data: length, kind, checksum
LONG_TEXT = 1000  # bytes of a chunk; packed a thousandfold at most, shorter ones pass Pillow


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

  What is transparent shows white. Of 16-bit greyscale the upper 8 bits remain. A PNG
  that Pillow refuses for the length of a text or colour profile is read without these.

  Raises:
    ValueError: missing, truncated, no image, or of numbers without a known range.
  """
  name = "the bytes given" if isinstance(source, bytes) else f'"{source}"'
  try:
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
      return _decode(content)
    except ValueError:
      short = _without_long_text(content)
      if short == content:
        raise
      return _decode(short)
  except Exception as error:  # in a broken file Pillow's decoders raise nearly anything
    unknown = isinstance(error, UnidentifiedImageError)
    fault = "of no kind that Pillow knows" if unknown else error
    raise ValueError(f"unreadable image: expected a whole image in {name}: {fault}") from error


def _decode(content: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(content)) as opened:
    return _to_rgb(ImageOps.exif_transpose(opened))


def _without_long_text(content: bytes) -> bytes:
  """A PNG without its long chunks of text and its colour profile; other files as they are.

  Pillow refuses a whole file for a chunk that unpacks to more than 1 MB, against attacks; editors
  and samplers write such, with a workflow or a screen's profile. Short texts stay, because some say
  how the image is turned.
  """
  if not content.startswith(PNG):
    return content
  kept, at = [PNG], len(PNG)
  while at + CHUNK <= len(content):
    length, kind = struct.unpack(">I4s", content[at : at + 8])
    chunk = content[at : at + CHUNK + length]
    text = kind in (b"tEXt", b"zTXt", b"iTXt") and len(chunk) > CHUNK + LONG_TEXT
    if not (text or kind == b"iCCP"):
      kept.append(chunk)
    at += len(chunk)
  return b"".join([*kept, content[at:]])


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


def crop(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 `[H, W, 3]` as uint8 of that shape: as large as it has to be, bilinear, then its centre.

  What train.py of SalesforceAIResearch/DiffusionDPO does by default, with torchvision's Resize of
  the shorter side and CenterCrop; there, shapes are square.
  """
  (H, W, _), (height, width, _) = image.shape, shape
  if height * W >= width * H:  # the height decides
    size = (max(width, int(height * W / H)), height)
  else:
    size = (width, max(height, int(width * H / W)))
  resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
  left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
  return np.asarray(resized)[top : top + height, left : left + width]


def squeeze(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 `[H, W, 3]` as uint8 of that shape, bicubic, whatever its aspect ratio."""
  height, width, _ = shape
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


IMAGES = Modality(
  "images",
  check,
  {"pixels": pixels},
  picture,
  write,
  fit=fit,
  read=read,
  resize={"crop": crop, "squeeze": squeeze},
)
