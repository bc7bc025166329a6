"""Image features, and the two measures of diversity on top of them."""

import numpy as np
import pytest

from jaxalign.evaluation import statistics
from jaxalign.modalities import features


@pytest.mark.parametrize("name", features.FEATURES)
def test_rows_have_norm_one_and_depend_on_their_image_alone(name):
  images = np.random.default_rng(0).uniform(size=(3, 64, 64, 3)).astype(np.float32)
  rows = features.get(name)(images)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.ones(3), rtol=1e-5)
  np.testing.assert_allclose(rows[:1], features.get(name)(images[:1]), rtol=1e-4, atol=1e-5)
  assert abs(rows[0] @ rows[1]) < 0.999


def test_pixels_by_hand():
  """A left half of white and a right half of black: +0.5 and -0.5 in every cell, so +-1/sqrt(F)."""
  images = np.zeros((1, 17, 16, 3), np.float32)
  images[:, :, :8] = 1.0
  row = features.pixels(images)[0].reshape(8, 8, 3)
  assert (row[:, :4] == 1 / np.sqrt(192)).all() and (row[:, 4:] == -1 / np.sqrt(192)).all()
  grey = features.pixels(np.full((1, 8, 8, 3), 0.5, np.float32))
  assert not grey.any()  # has no direction, and is not NaN


def test_images_that_are_too_small_and_unknown_names_are_errors():
  with pytest.raises(ValueError, match="at least 8 x 8, got 4 x 9"):
    features.pixels(np.zeros((1, 4, 9, 3)))
  with pytest.raises(ValueError, match=r'unknown \'pixel\'; did you mean "pixels"'):
    features.get("pixel")


def test_pairwise_distance_by_hand():
  rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
  assert statistics.mean_pairwise_distance(rows[:2], np.array([7, 7])) == pytest.approx(0.0)
  assert statistics.mean_pairwise_distance(rows[1:3], np.array([7, 7])) == pytest.approx(1.0)
  # Prompt 0: cosines 1, 0, 0 -> 2/3; prompt 1: cosine -0.6 -> 1.6; prompt 2 has one image.
  prompts = np.array([0, 0, 0, 1, 1, 2])
  rows = np.concatenate([rows, [[1.0, 0.0]]])
  expected = (2 / 3 + 1.6) / 2
  assert statistics.mean_pairwise_distance(rows, prompts) == pytest.approx(expected)
  assert statistics.mean_pairwise_distance(rows[:3], np.arange(3)) is None


def test_vendi_counts_different_images():
  eye = np.eye(6)
  assert statistics.vendi_score(eye[:4]) == pytest.approx(4.0)
  assert statistics.vendi_score(np.repeat(eye[:1], 5, axis=0)) == pytest.approx(1.0)
  assert statistics.vendi_score(np.repeat(eye[:3], 2, axis=0)) == pytest.approx(3.0)
  # Two images at cosine c: eigenvalues (1 +- c) / 2.
  c = 0.6
  rows = np.array([[1.0, 0.0], [c, np.sqrt(1 - c**2)]])
  expected = np.exp(-sum(p * np.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
  assert statistics.vendi_score(rows) == pytest.approx(expected)
