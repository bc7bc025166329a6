"""Grids: sizes, pixel values and the order of before and after."""

import numpy as np
import pytest
from PIL import Image

from jaxalign.modalities import pictures

CELL = 128  # an 8-pixel image is enlarged 16 times
WIDTH, HEIGHT = CELL + pictures.MARGIN, CELL + 2 * pictures.LINE + pictures.MARGIN


def flat(*values):
  """8 x 8 grey images of these values."""
  return np.stack([np.full((8, 8, 3), value, np.float32) for value in values])


def tile(picture, row, column):
  """The pixels of one image of the grid."""
  return np.asarray(picture)[row * HEIGHT : row * HEIGHT + CELL, column * WIDTH :][:, :CELL]


def caption(picture, row, column):
  """The pixels below one image of the grid."""
  top = row * HEIGHT + CELL
  return np.asarray(picture)[top : top + 2 * pictures.LINE, column * WIDTH :][:, :CELL]


def test_to_uint8_rounds_and_clips():
  values = np.array([-0.5, 0.0, 0.5 / 255 - 1e-6, 0.5 / 255 + 1e-6, 0.5, 1.0, 2.0])
  actual = pictures.to_uint8(values)
  assert actual.dtype == np.uint8
  np.testing.assert_array_equal(actual, [0, 0, 0, 1, 128, 255, 255])  # 127.5 to the even 128


def test_every_value_of_a_png_survives():
  values = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(pictures.to_uint8(values.astype(np.float32) / 255), values)


def test_the_grid_is_filled_row_by_row():
  picture = pictures.grid(flat(0.0, 0.2, 0.4, 0.6, 0.8), ["a b", "", "c", "d", "e"], columns=3)
  assert picture.size == (3 * WIDTH, 2 * HEIGHT) and picture.mode == "RGB"
  for index, value in enumerate([0, 51, 102, 153, 204]):
    assert (tile(picture, index // 3, index % 3) == value).all()
  assert (tile(picture, 1, 2) == 255).all()  # no sixth image


def test_pixels_are_enlarged_by_a_whole_factor_without_smoothing():
  image = np.random.default_rng(0).uniform(size=(1, 8, 6, 3)).astype(np.float32)
  picture = np.asarray(pictures.grid(image, [""], columns=1))
  scale = 22  # the least with 6 * 22 >= 128
  expected = pictures.to_uint8(image[0]).repeat(scale, axis=0).repeat(scale, axis=1)
  np.testing.assert_array_equal(picture[: 8 * scale, : 6 * scale], expected)


def test_a_large_image_keeps_its_size():
  picture = pictures.grid(np.zeros((1, 20, 130, 3)), ["x"], columns=1)
  assert picture.size == (130 + pictures.MARGIN, 20 + 2 * pictures.LINE + pictures.MARGIN)


def test_captions_are_below_their_image_and_wrapped_to_two_lines():
  long = "a red circle to the left of a green square and then many more words that do not fit"
  picture = pictures.grid(flat(0.5, 0.5), [long, ""], columns=2)
  below = caption(picture, 0, 0)
  assert (below[: pictures.LINE] < 128).any() and (below[pictures.LINE :] < 128).any()
  assert (caption(picture, 0, 1) == 255).all()  # nothing ran into the neighbour
  short = caption(pictures.grid(flat(0.5), ["a"], columns=1), 0, 0)
  assert (short[: pictures.LINE + 2] < 128).any() and (short[pictures.LINE + 2 :] == 255).all()


def test_captions_must_match_the_images():
  with pytest.raises(ValueError):
    pictures.grid(flat(0.1, 0.2), ["only one"], columns=2)


def test_before_is_above_after_in_every_pair_of_rows():
  before, after = flat(0.0, 0.2, 0.4), flat(1.0, 0.8, 0.6)
  picture = pictures.before_and_after(before, after, ["a", "b", "c"], columns=2)
  assert picture.size == (2 * WIDTH, 4 * HEIGHT)
  values = [[int(tile(picture, row, column).mean()) for column in range(2)] for row in range(4)]
  assert values == [[0, 51], [255, 204], [102, 255], [153, 255]]  # the last pair is half empty


def test_before_and_after_have_their_own_captions():
  picture = pictures.before_and_after(flat(0.5), flat(0.5), ["a square"], columns=1)
  below = [caption(picture, row, 0) for row in (0, 1)]
  single = pictures.grid(flat(0.5, 0.5), ["before: a square", "after: a square"], columns=1)
  for row in (0, 1):
    np.testing.assert_array_equal(below[row], caption(single, row, 0))
  assert (below[0] != below[1]).any()


@pytest.mark.parametrize("evaluated, rows, columns", [(0, 1, 1), (1, 1, 2), (3, 2, 3)])
def test_the_curve_has_a_panel_for_each_quantity(evaluated, rows, columns, tmp_path):
  names = ["loss/total", *(f"eval/{number}" for number in range(evaluated))]
  records = [{"step": step, **dict.fromkeys(names, float(step))} for step in range(3)]
  pictures.save_curve(records, tmp_path / "curve.png")
  with Image.open(tmp_path / "curve.png") as picture:
    assert picture.size == (round(3.6 * 120) * columns, round(2.4 * 120) * rows)
    assert (np.asarray(picture.convert("L")) < 200).any()
