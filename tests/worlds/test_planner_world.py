"""The planning world: attributes against hand-derived numbers, and records that never mix."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import streams
from jaxalign.worlds import planner

START, GOAL = np.array([[-0.8, 0.0]], np.float32), np.array([[0.8, 0.0]], np.float32)
ATTRIBUTES = ("clearance", "length", "smoothness", "end_distance", "success")


def line(start, goal, num_points=planner.HORIZON):
  share = np.linspace(0.0, 1.0, num_points)[:, None]
  return ((1 - share) * np.array(start) + share * np.array(goal)).astype(np.float32)[None]


def value(name, plans, start=START, goal=GOAL):
  return float(getattr(planner, name)(plans, start, goal)[0])


@pytest.fixture
def one_obstacle(monkeypatch):
  """A circle of radius 0.3 around (0.1, 0.2)."""
  monkeypatch.setattr(planner, "OBSTACLES", ((0.1, 0.2, 0.3),))


@pytest.mark.parametrize("segment, distance", [
  (((-1.0, 0.2), (1.0, 0.2)), -0.3),  # through the centre
  (((-1.0, -0.2), (1.0, -0.2)), 0.1),  # past it, 0.4 from the centre
  (((-1.0, 0.5), (1.0, 0.5)), 0.0),  # along the rim
  (((0.5, 0.2), (1.0, 0.2)), 0.1),  # its first end is the nearest
  (((-1.0, 0.2), (-0.3, 0.2)), 0.1),  # its last end
  (((0.4, 0.6), (0.4, 0.6)), 0.2),  # no length: (0.3, 0.4) from the centre
])  # fmt: skip
def test_the_distance_of_a_segment_from_a_rim(one_obstacle, segment, distance):
  found = planner.rim_distances(np.array([segment], np.float32))
  assert found.shape == (1, 1, 1)
  np.testing.assert_allclose(found, distance, atol=1e-6)


def test_clearance_at_the_rim_and_far_inside(one_obstacle):
  rim, center = line((-1.0, 0.5), (1.0, 0.5), 2), line((0.1, 0.2), (0.1, 0.2), 2)
  np.testing.assert_allclose(value("clearance", rim), -math.log(2.0), atol=1e-5)
  np.testing.assert_allclose(value("clearance", center), -0.3 / planner.SOFTNESS, rtol=1e-3)
  far = line((-1.0, -1.0), (1.0, -1.0))
  assert -1e-6 < value("clearance", far) <= 0.0
  # A mean over segments: half of them on the rim, half far away.
  half = np.array([[[0.1, 0.5], [0.1, 0.5], [0.1, 9.0], [0.1, 9.0]]], np.float32)
  np.testing.assert_allclose(value("clearance", half), -2 / 3 * math.log(2.0), atol=1e-5)


def test_the_attributes_of_a_straight_plan():
  plan = line(START[0], GOAL[0])
  np.testing.assert_allclose(value("length", plan), 1.6, rtol=1e-5)
  np.testing.assert_allclose(value("smoothness", plan), 0.0, atol=1e-10)
  np.testing.assert_allclose(value("end_distance", plan), 0.0, atol=1e-5)
  shifted = plan + np.array([0.03, 0.04], np.float32)
  np.testing.assert_allclose(value("end_distance", shifted), 0.1, atol=1e-5)


def test_smoothness_counts_second_differences():
  corner = np.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]]], np.float32)
  np.testing.assert_allclose(value("smoothness", corner), -5.0)  # (-1, 2) squared
  np.testing.assert_allclose(value("length", corner), 3.0, rtol=1e-6)


def test_success_needs_both_ends_and_a_free_way():
  over = np.concatenate([line(START[0], (0.0, 0.9), 9), line((0.0, 0.9), GOAL[0], 9)], axis=1)
  free = np.array([[[-0.8, 0.0], [-0.35, 0.25], [0.0, 0.4], [0.4, 0.25], [0.8, 0.0]]], np.float32)
  assert value("success", free) == 1.0
  assert value("success", over) == 0.0  # cuts (-0.4, 0.55)
  assert value("success", line(START[0], GOAL[0])) == 0.0  # cuts the middle
  beside = free.copy()
  beside[0, -1] += [0.0, planner.TOLERANCE + 0.01]
  assert value("success", beside) == 0.0
  beside[0, -1] -= [0.0, 0.02]
  assert value("success", beside) == 1.0
  # No way point is inside, but the segment between two of them is.
  through = np.array([[[-0.8, 0.0], [-0.35, 0.0], [0.35, 0.0], [0.8, 0.0]]], np.float32)
  centers, radii = np.array(planner.OBSTACLES)[:, :2], np.array(planner.OBSTACLES)[:, 2]
  assert (np.linalg.norm(through[0][:, None] - centers, axis=-1) > radii).all()
  assert value("success", through) == 0.0


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_pure_and_per_plan(name):
  rng = np.random.default_rng(0)
  plans = rng.uniform(-1, 1, (5, 16, 2)).astype(np.float32)
  start, goal = plans[:, 0] + 0.01, plans[:, -1]
  function = getattr(planner, name)
  whole = function(plans, start, goal)
  assert whole.shape == (5,) and whole.dtype == jnp.float32
  order = np.array([3, 1, 0, 4, 2])
  jitted = jax.jit(function)(plans[order], start[order], goal[order])
  np.testing.assert_allclose(jitted, whole[order], rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_where_points_coincide():
  plans = np.zeros((1, 4, 2), np.float32)  # no segment has a length; start and goal are met
  for name in ("clearance", "length", "smoothness", "end_distance"):
    function = getattr(planner, name)
    grad = jax.grad(lambda x: function(x, x[:, 0], x[:, -1]).sum())(plans)  # noqa: B023
    assert np.isfinite(grad).all(), name


def test_no_record_is_in_two_sets_or_twice_in_one():
  sets = {name: planner.records(name) for name in ("train", "validation", "test")}
  assert {name: len(found) for name, found in sets.items()} == planner.SIZES
  rows = {
    name: {(*record["start"], *record["goal"]) for record in found} for name, found in sets.items()
  }
  assert all(len(rows[name]) == len(sets[name]) for name in sets)
  assert not any(rows[a] & rows[b] for a, b in itertools.combinations(rows, 2))
  for record in itertools.chain(*sets.values()):
    assert set(record) == {"start", "goal"}
    assert -1 <= record["start"][0] <= -0.75 and 0.75 <= record["goal"][0] <= 1


def test_records_are_the_same_every_time_and_no_ones_to_change():
  first = planner.records("test")
  assert first[0] == {"start": (-0.78, 0.21), "goal": (0.75, 0.53)}
  first[0]["start"] = (0.0, 0.0)
  assert planner.records("test")[0]["start"] == (-0.78, 0.21)
  with pytest.raises(ValueError, match=r'expected one of test, validation, train, got "?\'?tests'):
    planner.records("tests")


def test_straight_ways_are_blocked_but_there_is_a_way_around():
  start, goal = planner.read_records(planner.records("train"))
  plans = np.concatenate([line(*ends) for ends in zip(start, goal, strict=True)])
  assert 0.0 < np.asarray(planner.success(plans, start, goal)).mean() < 0.2
  above = [[s, (s[0], 0.9), (g[0], 0.9), g] for s, g in zip(start, goal, strict=True)]
  assert np.asarray(planner.success(np.array(above, np.float32), start, goal)).all()


@pytest.fixture(scope="module")
def demonstrations():
  rng = streams.generator(1, "demonstrations")
  start, goal = planner.draw_ends(rng, 600)
  plans = {care: planner.demonstrate(rng, start, goal, care=care) for care in (0.0, 0.5, 1.0)}
  return start, goal, plans


def test_demonstrations_start_and_end_where_asked_and_stay_in_the_field(demonstrations):
  start, goal, plans = demonstrations
  for found in plans.values():
    assert found.shape == (600, planner.HORIZON, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], start, atol=1e-6)
    np.testing.assert_allclose(found[:, -1], goal, atol=1e-6)
    assert np.abs(found).max() <= 1.0


def test_care_makes_better_demonstrations_of_both_sides(demonstrations):
  start, goal, plans = demonstrations
  rates = [np.asarray(planner.success(plans[care], start, goal)).mean() for care in sorted(plans)]
  assert rates[0] < 0.4 < rates[1] < 0.75 < rates[2]
  middle = plans[1.0][:, planner.HORIZON // 2, 1]
  assert (middle > 0.3).mean() > 0.2 and (middle < -0.3).mean() > 0.2


@pytest.mark.parametrize("record, message", [
  ({"start": (0, 0)}, 'record 1: expected a "goal" of two numbers, found none'),
  ({"start": "here", "goal": (0, 0)}, 'record 1: expected a "start" of two .*found \'here\''),
  ({"start": (0, 0, 0), "goal": (0, 0)}, r'"start" of two numbers, found \(0, 0, 0\)'),
  ({"start": (0, 0), "goal": (0, math.nan)}, r'"goal" of two numbers in \[-1, 1\], found'),
  ({"start": (0, 2), "goal": (0, 0)}, r'"start" of two numbers in \[-1, 1\], found \(0, 2\)'),
])  # fmt: skip
def test_a_record_that_cannot_be_read_is_named(record, message):
  good = {"start": [0.0, 0.1], "goal": np.array([0.5, 0.5]), "id": 3}
  start, goal = planner.read_records([good])
  assert start.tolist() == [[0.0, np.float32(0.1)]] and goal.dtype == np.float32
  with pytest.raises(ValueError, match=message):
    planner.read_records([good, record])
