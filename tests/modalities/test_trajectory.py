"""Plans: what is refused, features that know only the shape of a way, and a grid of plots."""

import numpy as np
import pytest

from jaxalign.modalities import modality, trajectory
from jaxalign.modalities.trajectory import PLANS


def straight(num_points, start=(0.0, 0.0), end=(1.0, 0.0)):
  share = np.linspace(0.0, 1.0, num_points)[:, None]
  return ((1 - share) * np.array(start) + share * np.array(end)).astype(np.float32)


@pytest.mark.parametrize("shape", [(16, 2), (3, 16, 3), (3, 1, 2)])
def test_another_rank_is_refused(shape):
  with pytest.raises(modality.SampleError, match=r"expected plans \[N, H, 2\]"):
    PLANS.check(np.zeros(shape))


def test_the_first_bad_plan_is_named():
  plans = np.zeros((3, 4, 2))
  PLANS.check(plans)
  plans[1, 3, 0] = np.inf
  with pytest.raises(modality.SampleError, match=r"1 of 3 .* index 1") as caught:
    PLANS.check(plans)
  assert caught.value.index == 1


def test_features_do_not_depend_on_place_size_or_number_of_way_points():
  plans = [straight(5), straight(16), straight(31, (-1.0, 0.5), (-0.8, 0.5))]
  features = np.concatenate([trajectory.waypoints(plan[None]) for plan in plans])
  assert features.shape == (3, 32)
  np.testing.assert_allclose(features @ features.T, 1.0, atol=1e-6)
  back = trajectory.waypoints(straight(8, (1.0, 0.0), (0.0, 0.0))[None])
  np.testing.assert_allclose(features @ back.T, -1.0, atol=1e-6)
  across = trajectory.waypoints(straight(8, (0.0, 0.0), (0.0, 2.0))[None])
  np.testing.assert_allclose(features @ across.T, 0.0, atol=1e-6)


def test_a_plan_of_one_place_has_features_of_zeros():
  np.testing.assert_array_equal(trajectory.waypoints(np.ones((1, 4, 2))), np.zeros((1, 32)))


def test_a_picture_has_a_cell_a_plan_and_shows_obstacles():
  plans = [straight(8), None, straight(8)]
  captions = ["before: a", "", "after: b"]
  plain = PLANS.picture(plans, captions, 2)
  pixels = np.asarray(plain)
  height, width = pixels.shape[:2]
  assert (width, height) == (300, 360)
  corners = [part for rows in np.array_split(pixels, 2) for part in np.array_split(rows, 2, axis=1)]
  drawn = [(part < 128).any() for part in corners]
  assert drawn == [True, False, True, False]
  with_obstacle = np.asarray(trajectory.make([(0.0, 0.0, 0.5)]).picture(plans, captions, 2))
  grey = (with_obstacle == 204).all(axis=-1)
  assert grey.sum() > 5000 and (pixels == 204).all(axis=-1).sum() < 500  # edges of letters


def test_one_file_a_plan(tmp_path):
  plans = np.stack([straight(4), straight(4, end=(0.0, 1.0))])
  paths = PLANS.write(plans, tmp_path)
  assert [path.name for path in paths] == ["0000.npy", "0001.npy"]
  np.testing.assert_array_equal([np.load(path) for path in paths], plans)
