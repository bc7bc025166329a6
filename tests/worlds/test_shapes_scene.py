"""The renderer: areas and centroids by hand, antialiasing, and a palette without look-alikes."""

import itertools

import numpy as np
import pytest

from jaxalign.worlds.shapes import scene


def _distance(first: tuple, second: tuple) -> float:
  return float(np.linalg.norm(np.subtract(first, second)) / 255)


def test_no_two_colours_are_close():
  for first, second in itertools.combinations(scene.COLOURS.values(), 2):
    assert _distance(first, second) >= 0.47
  for first, second in itertools.product(scene.COLOURS.values(), scene.GROUNDS.values()):
    assert _distance(first, second) >= 0.5
  for first, second in itertools.combinations(scene.GROUNDS.values(), 2):
    assert _distance(first, second) >= 0.36


def test_a_faded_object_is_no_other_colour():
  # Halfway between any object colour and any ground, no palette colour of an object is nearer
  # than the judge's tolerance of 0.22.
  for colour, ground in itertools.product(scene.COLOURS.values(), scene.GROUNDS.values()):
    halfway = tuple(np.add(colour, ground) / 2)
    assert min(_distance(halfway, other) for other in scene.COLOURS.values()) > 0.22


# Areas of the unit shapes over the square of their size, from elementary geometry.
AREAS = {
  "circle": np.pi / 4,
  "square": 1.0,
  "triangle": 0.5,
  "cross": 2 * 0.36 - 0.36**2,
  "ring": np.pi / 4 * (1 - 0.5**2),
}


@pytest.mark.parametrize("shape", scene.SHAPES)
@pytest.mark.parametrize("size", [14.0, 20.3, 26.0])
# Four samples per pixel and axis place an edge to within an eighth of a pixel.
def test_coverage_has_the_area_and_centroid_of_the_shape(shape, size):
  x, y = 31.37, 24.61
  mask = scene.coverage(shape, x, y, size)
  assert mask.sum() == pytest.approx(AREAS[shape] * size**2, rel=0.04)
  centres = np.arange(64) + 0.5
  below = size / 6 if shape == "triangle" else 0  # a third of the height above the base
  assert mask.sum(0) @ centres / mask.sum() == pytest.approx(x, abs=0.13)
  assert mask.sum(1) @ centres / mask.sum() == pytest.approx(y + below, abs=0.13)


def test_coverage_of_a_square_by_hand():
  # [2.5, 6.5] on both axes: 0.5 on the sides, 0.25 in the corners, 1 inside.
  mask = scene.coverage("square", 4.5, 4.5, 4.0, extent=9)
  profile = np.array([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0])
  np.testing.assert_allclose(mask, np.outer(profile, profile), atol=1e-6)


def test_coverage_outside_the_image_is_cut_off():
  assert scene.coverage("square", -20, 10, 8).sum() == 0
  assert scene.coverage("square", 0, 10, 8).sum() == pytest.approx(32)


def test_render_blends_object_into_ground():
  item = scene.Object("square", "red", 32.5, 32.0, 20.0)
  image = scene.render(scene.Scene("white", (item,)))
  assert image.shape == (64, 64, 3)
  assert image.dtype == np.uint8
  assert tuple(image[0, 0]) == scene.GROUNDS["white"]
  assert tuple(image[32, 32]) == scene.COLOURS["red"]
  half = np.add(scene.GROUNDS["white"], scene.COLOURS["red"]) / 2  # column 22 is half covered
  np.testing.assert_allclose(image[32, 22], half, atol=0.51)


def test_apart_is_the_free_space_between_bounding_squares():
  first = scene.Object("circle", "red", 10, 10, 8)
  second = scene.Object("circle", "red", 25, 12, 10)
  assert scene.apart(first, second) == pytest.approx(15 - 9)
