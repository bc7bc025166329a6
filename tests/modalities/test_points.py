"""Points: what is refused, their features, and a plot that tells two models apart."""

import numpy as np
import pytest

from jaxalign.modalities import modality, points
from jaxalign.modalities.points import POINTS


@pytest.mark.parametrize("shape", [(4,), (4, 2, 2), (4, 0)])
def test_another_rank_is_refused(shape):
  with pytest.raises(modality.SampleError, match=r"expected points \[N, D\]"):
    POINTS.check(np.zeros(shape))


def test_the_first_bad_point_is_named():
  samples = np.zeros((4, 1))
  POINTS.check(samples)
  samples[2:] = np.nan
  with pytest.raises(modality.SampleError, match=r"2 of 4 .* index 2") as caught:
    POINTS.check(samples)
  assert caught.value.index == 2


def test_features_are_cosines_of_half_the_distance():
  x = np.array([[0.0, 1.0], [0.0, 1.0], [2.0, 1.0], [-4.0, 3.0]])
  features = points.angles(x)
  product = features @ features.T
  np.testing.assert_allclose(np.diagonal(product), 1.0)
  expected = [1.0, 1.0, (np.cos(1.0) + 1.0) / 2, (np.cos(2.0) + np.cos(1.0)) / 2]
  np.testing.assert_allclose(product[0], expected, atol=1e-12)


def warmth(image):
  """By how much the reddest pixel is more red than blue, and the bluest more blue than red."""
  red, _, blue = np.moveaxis(np.asarray(image, int), -1, 0)
  return (red - blue).max(), (blue - red).max()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_one_plot_has_both_models_in_two_colours(dim):
  rng = np.random.default_rng(0)
  before, after = rng.normal(size=(2, 30, dim))
  image = modality.before_and_after(POINTS, before, after, ["x"] * 30, 8)
  orange, blue = warmth(image)
  assert image.size == (400, 400)
  assert orange > 100 and blue < 20
  orange, blue = warmth(POINTS.picture(list(before), ["x"] * 30, 8))
  assert blue > 60 and orange < 20


def test_missing_points_leave_the_plot_as_it_is():
  point = np.array([1.0, 2.0])
  with_none = POINTS.picture([point, None], ["after: a", ""], 2)
  assert with_none.tobytes() == POINTS.picture([point], ["after: a"], 2).tobytes()
  with pytest.raises(ValueError, match="at least one point"):
    POINTS.picture([None], [""], 2)


def test_one_file_a_point(tmp_path):
  samples = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
  paths = POINTS.write(samples, tmp_path)
  assert [path.name for path in paths] == ["0000.npy", "0001.npy"]
  np.testing.assert_array_equal([np.load(path) for path in paths], samples)
