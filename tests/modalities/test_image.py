"""Images: grids, captions, features, and what must not be scored."""

import numpy as np
import pytest

from jaxalign.modalities import image
from jaxalign.modalities.image import IMAGES
from jaxalign.modalities.modality import SampleError, before_and_after

CELL = 128  # an 8-pixel image is enlarged 16 times
WIDTH, HEIGHT = CELL + image.MARGIN, CELL + 2 * image.LINE + image.MARGIN


def flat(*values):
  """8 x 8 grey images of these values."""
  return np.stack([np.full((8, 8, 3), value, np.float32) for value in values])


def tile(picture, row, column):
  """The pixels of one image of the grid."""
  return np.asarray(picture)[row * HEIGHT : row * HEIGHT + CELL, column * WIDTH :][:, :CELL]


def caption(picture, row, column):
  """The pixels below one image of the grid."""
  top = row * HEIGHT + CELL
  return np.asarray(picture)[top : top + 2 * image.LINE, column * WIDTH :][:, :CELL]


def test_to_uint8_rounds_and_clips():
  values = np.array([-0.5, 0.0, 0.5 / 255 - 1e-6, 0.5 / 255 + 1e-6, 0.5, 1.0, 2.0])
  actual = image.to_uint8(values)
  assert actual.dtype == np.uint8
  np.testing.assert_array_equal(actual, [0, 0, 0, 1, 128, 255, 255])  # 127.5 to the even 128


def test_every_value_of_a_png_survives():
  values = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(image.to_uint8(values.astype(np.float32) / 255), values)


def test_the_grid_is_filled_row_by_row():
  picture = image.picture(flat(0.0, 0.2, 0.4, 0.6, 0.8), ["a b", "", "c", "d", "e"], columns=3)
  assert picture.size == (3 * WIDTH, 2 * HEIGHT) and picture.mode == "RGB"
  for index, value in enumerate([0, 51, 102, 153, 204]):
    assert (tile(picture, index // 3, index % 3) == value).all()
  assert (tile(picture, 1, 2) == 255).all()  # no sixth image


def test_pixels_are_enlarged_by_a_whole_factor_without_smoothing():
  images = np.random.default_rng(0).uniform(size=(1, 8, 6, 3)).astype(np.float32)
  picture = np.asarray(image.picture(images, [""], columns=1))
  scale = 22  # the least with 6 * 22 >= 128
  expected = image.to_uint8(images[0]).repeat(scale, axis=0).repeat(scale, axis=1)
  np.testing.assert_array_equal(picture[: 8 * scale, : 6 * scale], expected)


def test_a_large_image_keeps_its_size():
  picture = image.picture(np.zeros((1, 20, 130, 3)), ["x"], columns=1)
  assert picture.size == (130 + image.MARGIN, 20 + 2 * image.LINE + image.MARGIN)


def test_captions_are_below_their_image_and_wrapped_to_two_lines():
  long = "a red circle to the left of a green square and then many more words that do not fit"
  picture = image.picture(flat(0.5, 0.5), [long, ""], columns=2)
  below = caption(picture, 0, 0)
  assert (below[: image.LINE] < 128).any() and (below[image.LINE :] < 128).any()
  assert (caption(picture, 0, 1) == 255).all()  # nothing ran into the neighbour
  short = caption(image.picture(flat(0.5), ["a"], columns=1), 0, 0)
  assert (short[: image.LINE + 2] < 128).any() and (short[image.LINE + 2 :] == 255).all()


def test_captions_must_match_the_images():
  with pytest.raises(ValueError):
    image.picture(flat(0.1, 0.2), ["only one"], columns=2)


def test_before_is_above_after_in_every_pair_of_rows():
  before, after = flat(0.0, 0.2, 0.4), flat(1.0, 0.8, 0.6)
  picture = before_and_after(IMAGES, before, after, ["a", "b", "c"], columns=2)
  assert picture.size == (2 * WIDTH, 4 * HEIGHT)
  values = [[int(tile(picture, row, column).mean()) for column in range(2)] for row in range(4)]
  assert values == [[0, 51], [255, 204], [102, 255], [153, 255]]  # the last pair is half empty


def test_before_and_after_have_their_own_captions():
  picture = before_and_after(IMAGES, flat(0.5), flat(0.5), ["a square"], columns=1)
  below = [caption(picture, row, 0) for row in (0, 1)]
  single = image.picture(flat(0.5, 0.5), ["before: a square", "after: a square"], columns=1)
  for row in (0, 1):
    np.testing.assert_array_equal(below[row], caption(single, row, 0))
  assert (below[0] != below[1]).any()


def test_rows_of_features_have_norm_one_and_depend_on_their_image_alone():
  images = np.random.default_rng(0).uniform(size=(3, 64, 64, 3)).astype(np.float32)
  rows = image.pixels(images)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.ones(3), rtol=1e-5)
  np.testing.assert_allclose(rows[:1], image.pixels(images[:1]), rtol=1e-4, atol=1e-5)
  assert abs(rows[0] @ rows[1]) < 0.999


def test_pixels_by_hand():
  """A left half of white and a right half of black: +0.5 and -0.5 in every cell, so +-1/sqrt(F)."""
  images = np.zeros((1, 17, 16, 3), np.float32)
  images[:, :, :8] = 1.0
  row = image.pixels(images)[0].reshape(8, 8, 3)
  assert (row[:, :4] == 1 / np.sqrt(192)).all() and (row[:, 4:] == -1 / np.sqrt(192)).all()
  grey = image.pixels(np.full((1, 8, 8, 3), 0.5, np.float32))
  assert not grey.any()  # has no direction, and is not NaN


def test_images_that_are_too_small_are_errors():
  with pytest.raises(ValueError, match="at least 8 x 8, got 4 x 9"):
    image.pixels(np.zeros((1, 4, 9, 3)))


@pytest.mark.parametrize("images, message", [
  (np.zeros((2, 4, 4)), r"expected images \[N, H, W, 3\], got shape \(2, 4, 4\)"),
  (np.zeros((2, 4, 4, 1)), r"got shape \(2, 4, 4, 1\)"),
])
def test_the_check_names_a_wrong_shape(images, message):
  with pytest.raises(SampleError, match=message):
    image.check(images)


def test_the_check_names_the_first_image_that_is_not_finite():
  images = np.zeros((4, 4, 4, 3))
  image.check(images)
  images[2, 3, 2, 0], images[3] = np.nan, np.inf
  with pytest.raises(SampleError, match=r"2 of 4 with NaN or inf.*index 2") as caught:
    image.check(images)
  assert caught.value.index == 2
