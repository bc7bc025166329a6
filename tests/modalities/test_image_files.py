"""Images of files: long texts in them, and how they are brought to another size."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from preference_records import BLUE, NOISE, RED, encode

from jaxalign.modalities import image
from jaxalign.modalities.image import IMAGES

PIXELS = np.asarray(NOISE)
LONG = "x" * (3 * PngImagePlugin.MAX_TEXT_CHUNK)


def chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(added, last=False):
  """The noise as PNG with a chunk before its data, or after them."""
  content = encode(NOISE)
  at = content.index(b"IEND" if last else b"IDAT") - 4
  return content[:at] + added + content[at:]


def with_text(count=1, packed=False):
  info = PngImagePlugin.PngInfo()
  for number in range(count):
    info.add_text(f"workflow{number}", LONG, zip=packed)
  return encode(NOISE, pnginfo=info)


PROFILE = chunk(b"iCCP", b"screen\0\0" + zlib.compress(bytes(3 * PngImagePlugin.MAX_TEXT_CHUNK)))
INTERNATIONAL = chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG.encode()))


@pytest.mark.parametrize("content", [
  with_text(packed=True),
  with_text(count=30),  # more than Pillow takes of all texts together
  with_chunk(PROFILE),
  with_chunk(INTERNATIONAL),
  with_chunk(INTERNATIONAL, last=True),
], ids=["packed", "many", "profile", "international", "after the pixels"])  # fmt: skip
def test_a_long_text_does_not_hide_the_image(content, tmp_path):
  """python-pillow/Pillow#8363, Comfy-Org/ComfyUI PR#3316: workflows and profiles of screens."""
  path = tmp_path / "a.png"
  path.write_bytes(content)
  with pytest.raises(ValueError, match="MAX_TEXT"):
    Image.open(path).load()
  np.testing.assert_array_equal(IMAGES.read(content), PIXELS)
  np.testing.assert_array_equal(IMAGES.read(path), PIXELS)
  assert not ImageFile.LOAD_TRUNCATED_IMAGES
  assert PngImagePlugin.MAX_TEXT_CHUNK == ImageFile.SAFEBLOCK


def test_how_an_image_is_turned_is_still_read_beside_a_long_text():
  exif = Image.Exif()
  exif[0x0112] = 6
  info = PngImagePlugin.PngInfo()
  info.add_text("workflow", LONG, zip=True)
  tall = Image.new("RGB", (6, 4), RED)
  tall.putpixel((0, 3), BLUE)
  read = IMAGES.read(encode(tall, exif=exif, pnginfo=info))
  assert read.shape == (6, 4, 3) and tuple(read[0, 0]) == BLUE


@pytest.mark.parametrize("cut", [40, 200, 1500])
def test_a_truncated_image_with_a_long_text_stays_refused(cut):
  with pytest.raises(ValueError, match="unreadable image: "):
    IMAGES.read(with_text(packed=True)[:-cut])


def stripes(width, height):
  """Each column has its own grey, each row its own red."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  return np.stack([y, x, x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("width, height, left, top", [
  (32, 16, 8, 0), (16, 32, 0, 8), (19, 16, 2, 0), (16, 17, 0, 0), (16, 16, 0, 0),
])  # fmt: skip
def test_an_image_that_is_large_enough_is_cropped_around_its_centre(width, height, left, top):
  """huaishengzhu/DSPO#4. Offsets are rounded to even halves: (19 - 16) / 2 to 2, 0.5 to 0."""
  made = stripes(width, height)
  np.testing.assert_array_equal(
    image.crop(made, (16, 16, 3)), made[top : top + 16, left : left + 16]
  )


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 12, 3), (12, 8, 3), (40, 40, 3), (1, 1, 3)])
@pytest.mark.parametrize("size", [(32, 16), (16, 32), (33, 17), (5, 90), (90, 91), (1, 1), (7, 1)])
def test_a_crop_has_its_shape_and_keeps_the_aspect_ratio(size, shape):
  found = image.crop(stripes(*size), shape)
  assert found.shape == shape and found.dtype == np.uint8
  plain = np.full((size[1], size[0], 3), 77, np.uint8)
  assert (image.crop(plain, shape) == 77).all()


def test_a_circle_stays_one_in_a_crop_and_not_when_squeezed():
  x, y = np.meshgrid(np.arange(128) - 63.5, np.arange(64) - 31.5)
  disc = np.repeat(np.where(x**2 + y**2 < 24**2, 255, 0).astype(np.uint8)[..., None], 3, axis=2)

  def sides(made):
    inside = made[..., 0] > 127
    return np.ptp(np.nonzero(inside.any(axis=0))) + 1, np.ptp(np.nonzero(inside.any(axis=1))) + 1

  assert sides(image.crop(disc, (32, 32, 3))) == (24, 24)
  assert sides(image.squeeze(disc, (32, 32, 3))) == (12, 24)


def test_a_crop_is_that_of_the_published_transform():
  """Resize(16) of the shorter side, bilinear and antialiased, then CenterCrop(16)."""
  made = np.random.default_rng(0).integers(0, 256, (50, 75, 3), np.uint8)
  resized = Image.fromarray(made).resize((24, 16), Image.Resampling.BILINEAR)
  expected = np.asarray(resized.crop((4, 0, 20, 16)))
  np.testing.assert_array_equal(image.crop(made, (16, 16, 3)), expected)
