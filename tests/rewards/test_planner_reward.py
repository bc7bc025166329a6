"""Rewards of plans: the contract of each, and a gradient that leads to success."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import rewards, streams
from jaxalign.worlds import planner

RECORDS = planner.records("validation")
DEVICE = ("planner", "planner_clearance", "planner_length", "planner_smoothness")


@pytest.fixture(scope="module")
def plans():
  start, goal = planner.read_records(RECORDS)
  return planner.demonstrate(streams.generator(0, "demonstrations"), start, goal)


@pytest.mark.parametrize("name", DEVICE)
def test_every_device_reward_keeps_the_contract(name, plans):
  # Off the ends, where the distance to them has a cusp.
  plans = plans + np.random.default_rng(0).normal(scale=0.02, size=plans.shape).astype(np.float32)
  reward = rewards.make_device(name)
  query = reward.encode(RECORDS)
  assert reward.name == name
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(query))
  values = reward.score(reward.params, plans, query)
  assert values.shape == (48,) and values.dtype == jnp.float32
  grad = jax.grad(lambda x: reward.score(reward.params, x, query).sum())(plans)
  assert np.isfinite(grad).all() and (np.abs(grad).max(axis=(1, 2)) > 0).all()
  raised = reward.score(reward.params, plans + 1e-4 * np.sign(grad), query)
  assert (np.asarray(raised) > values).mean() > 0.9
  on_host = rewards.make(name, shapes_only=True)
  np.testing.assert_allclose(on_host.fn(plans, RECORDS), values, rtol=1e-5, atol=1e-6)
  order = np.arange(48)[::-1]
  shuffled = on_host.fn(plans[order], [RECORDS[i] for i in order])
  np.testing.assert_allclose(shuffled[order], values, rtol=1e-5, atol=1e-6)


def test_each_is_its_attribute(plans):
  ends = planner.read_records(RECORDS)
  for name in ("clearance", "smoothness", "success"):
    expected = getattr(planner, name)(plans, *ends)
    np.testing.assert_allclose(
      rewards.make(f"planner_{name}").fn(plans, RECORDS), expected, rtol=1e-5
    )
  length = rewards.make("planner_length").fn(plans, RECORDS)
  np.testing.assert_allclose(length, -planner.length(plans, *ends), rtol=1e-5)
  found = rewards.make("planner_success").fn(plans, RECORDS)
  assert set(found.tolist()) == {0.0, 1.0} and found.dtype == np.float32
  with pytest.raises(ValueError, match="runs on the host only"):
    rewards.make_device("planner_success")
  with pytest.raises(ValueError, match='record 0: expected a "goal"'):
    rewards.make("planner_success").fn(plans[:1], [{"start": (0, 0)}])


def test_a_straight_way_past_all_obstacles_is_worth_1():
  record = {"start": (-0.9, 0.95), "goal": (0.9, 0.95)}
  plan = np.linspace(record["start"], record["goal"], planner.HORIZON)[None].astype(np.float32)
  value = rewards.make("planner").fn(plan, [record])
  np.testing.assert_allclose(value, 1.0, atol=0.02)
  # A shift by (0, 0.03) costs 3 times 0.06 of the ends, and takes the way further off.
  shifted = rewards.make("planner", clearance=0.0).fn(plan + np.array([0, 0.03], "f"), [record])
  np.testing.assert_allclose(shifted, 1.0 - 3.0 * 0.06, atol=1e-3)
  none = rewards.make("planner", clearance=0.0, length=0.0, smoothness=0.0, ends=0.0)
  np.testing.assert_array_equal(none.fn(plan + 1, [record]), 1.0)


def test_demonstrations_lie_in_the_range_that_is_promised(plans):
  values = rewards.make("planner").fn(plans, RECORDS)
  assert values.min() > -5.0 and values.max() < 1.0
  success = rewards.make("planner_success").fn(plans, RECORDS)
  assert values[success == 1].mean() > values[success == 0].mean() + 0.3


def test_climbing_the_reward_raises_success():
  ends = planner.read_records(RECORDS)
  plans = planner.demonstrate(streams.generator(0, "demonstrations"), *ends, care=0.0)
  reward = rewards.make_device("planner")
  query = reward.encode(RECORDS)
  step = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, query).sum()))
  climbed = jnp.array(plans)
  for _ in range(150):
    climbed = climbed + 0.003 * step(climbed)
  success = rewards.make("planner_success")
  before, after = success.fn(plans, RECORDS), success.fn(np.asarray(climbed), RECORDS)
  assert before.mean() < 0.5 and after.mean() > before.mean() + 0.2
