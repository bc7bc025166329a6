"""The batch algebra by hand, and that an iteration trains every transition it should, once."""

import ast
import collections
import re

import numpy as np
import pytest

from jaxalign.training import batching

STEPS = (0, 1, 2, 3, 5)  # step 4 is not trained
FITTING = dict(
  num_records=4,
  group_size=6,
  microbatch=3,
  updates_per_epoch=2,
  num_epochs=3,
  timestep_range=(0.0, 1.0),
  timestep_fraction=0.6,
  steps=STEPS,
)


def a_pair_each(num_records, group_size):
  return num_records, 2


def solve(**changes):
  return batching.solve(**{**FITTING, **changes})


def test_a_plan_by_hand():
  # 24 images; 8 rollout calls; 12 images and 0.6 * 5 = 3 timesteps an update, 36 / 3 slices.
  assert solve() == batching.BatchPlan(
    samples=24,
    num_records=4,
    group_size=6,
    microbatch=3,
    microbatches=8,
    examples=24,
    width=1,
    slice_size=3,
    examples_per_update=12,
    steps=STEPS,
    timesteps=3,
    slices=12,
    num_epochs=3,
    updates=6,
    shards=1,
  )


@pytest.mark.parametrize(
  "fraction, num_steps, timesteps", [(1.0, 7, 7), (0.5, 10, 5), (0.6, 4, 2), (0.01, 50, 1)]
)
def test_timesteps_are_rounded_and_at_least_one(fraction, num_steps, timesteps):
  assert solve(timestep_fraction=fraction, steps=range(num_steps)).timesteps == timesteps


@pytest.mark.parametrize(
  "window, steps", [((0.0, 1.0), STEPS), ((0.0, 0.6), (0, 1, 2)), ((0.5, 0.9), (2, 3))]
)
def test_a_range_cuts_a_window_of_the_steps(window, steps):
  plan = solve(timestep_range=window, timestep_fraction=1.0)
  assert plan.steps == steps and plan.timesteps == len(steps)


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_a_range_that_is_none_is_an_error(window):
  with pytest.raises(ValueError, match=r"timestep_range: expected 0 <= first < last <= 1, got"):
    solve(timestep_range=window)


def test_a_range_without_steps_is_an_error():
  with pytest.raises(ValueError, match="holds none of the 5 steps"):
    solve(timestep_range=(0.0, 0.05))


def test_describe_says_the_counts():
  first, second = solve().describe("images").splitlines()
  assert "24 images = 4 records x 6" in first and "8 microbatches of 3" in first
  assert "6 optimizer steps" in second and "12 images x 3 of 5 timesteps" in second
  assert "12 slices of 3" in second


@pytest.mark.parametrize(
  "field", ["num_records", "group_size", "microbatch", "updates_per_epoch", "num_epochs"]
)
@pytest.mark.parametrize("value", [0, -2])
def test_a_count_below_one_is_named_and_one_works(field, value):
  with pytest.raises(
    ValueError, match=rf"config\.batch\.{field}: expected at least 1, got {value}"
  ):
    solve(**{field: value})
  assert solve(**{"microbatch": 1, "updates_per_epoch": 1, field: 1})


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_is_named_and_the_bound_works(value):
  with pytest.raises(ValueError, match=r"config\.batch\.timestep_fraction: .* in \(0, 1\], got"):
    solve(timestep_fraction=value)
  assert solve(timestep_fraction=1.0).timesteps == len(STEPS)


@pytest.mark.parametrize(
  "microbatch, updates",
  [(5, 2), (24, 2), (7, 1), (100, 3), (3, 5), (5, 7), (9, 16), (3, 24), (1, 25)],
)
def test_what_does_not_split_is_told_with_values_that_do(microbatch, updates):
  with pytest.raises(ValueError, match=r"config\.batch: 24 samples \(4 records x 6\)") as caught:
    solve(microbatch=microbatch, updates_per_epoch=updates)
  message = str(caught.value)
  assert len(message.splitlines()) <= 3
  field, values = re.search(r"(\w+) can be one of (\[.*?\])", message).groups()
  suggested = dict(microbatch=microbatch, updates_per_epoch=updates)
  also = re.search(r"with microbatch (\d+)", message)
  if also:
    suggested["microbatch"] = int(also[1])
  assert ast.literal_eval(values)
  for value in ast.literal_eval(values):
    assert solve(**{**suggested, field: value})
  missing = [v for v in range(1, 25) if v not in ast.literal_eval(values)]
  for value in missing:  # the list is complete
    with pytest.raises(ValueError):
      solve(**{**suggested, field: value})


# ---- the selections of an iteration


def test_every_transition_is_trained_once_in_each_epoch():
  plan = solve(timestep_fraction=1.0)
  chosen = batching.selections(plan, seed=3, iteration=8)
  assert len(chosen) == plan.updates == 6
  every = {(image, i) for image in range(plan.examples) for i in STEPS}
  for epoch in (chosen[0:2], chosen[2:4], chosen[4:6]):
    pairs = [
      pair
      for s in epoch
      for pair in zip(s.example.ravel().tolist(), s.i.ravel().tolist(), strict=True)
    ]
    assert len(pairs) == len(every) and set(pairs) == every


def test_part_of_the_timesteps_are_distinct_and_drawn_for_each_image():
  plan = solve()
  first, second = batching.selections(plan, seed=0, iteration=0)[:2]
  by_image = collections.defaultdict(list)
  for s in (first, second):
    assert s.example.shape == s.i.shape == (plan.slices, plan.microbatch)
    assert s.example.dtype == s.i.dtype == np.int32
    for image, i in zip(s.example.ravel().tolist(), s.i.ravel().tolist(), strict=True):
      by_image[image].append(i)
  assert sorted(by_image) == list(range(plan.examples))
  assert all(len(set(steps)) == len(steps) == plan.timesteps for steps in by_image.values())
  assert all(i in STEPS for steps in by_image.values() for i in steps)
  assert len({tuple(steps) for steps in by_image.values()}) > 5  # not one choice for all


def test_one_image_is_in_one_update_and_at_most_once_in_a_slice():
  plan = solve()
  first, second = batching.selections(plan, seed=0, iteration=0)[:2]
  assert not set(first.example.ravel().tolist()) & set(second.example.ravel().tolist())
  for s in (first, second):
    assert all(len(set(row.tolist())) == plan.microbatch for row in s.example)


def test_all_timesteps_are_trained_equally_often():
  plan = solve(num_records=100, num_epochs=1)  # 600 images, 3 of 5 steps each
  counts = sum(
    np.bincount(s.i.ravel(), minlength=6)[list(STEPS)]
    for s in batching.selections(plan, seed=1, iteration=0)
  )
  # Expected 360 each, standard deviation sqrt(600 * 0.6 * 0.4) = 12.
  assert counts.sum() == 1800 and np.abs(counts - 360).max() < 5 * 12


def test_a_pure_function_of_seed_and_iteration():
  def flat(seed, iteration):
    chosen = batching.selections(solve(), seed=seed, iteration=iteration)
    return np.concatenate([np.concatenate([s.example, s.i]) for s in chosen])

  np.testing.assert_array_equal(flat(5, 2), flat(5, 2))
  for other in (flat(5, 3), flat(6, 2), flat(2, 5)):
    assert (flat(5, 2) != other).mean() > 0.3


def test_epochs_are_shuffled_anew():
  chosen = batching.selections(solve(updates_per_epoch=1), seed=0, iteration=0)
  assert (chosen[0].example != chosen[1].example).any() and (chosen[0].i != chosen[1].i).any()


def test_the_first_optimizer_step_alone_is_fresh():
  chosen = batching.selections(solve(), seed=0, iteration=0)
  assert [set(s.fresh.ravel().tolist()) for s in chosen] == [{True}, *[{False}] * 5]
  assert all(s.fresh.shape == s.example.shape for s in chosen)


# ---- shards: each device takes its part of a slice from what it holds


def test_each_column_of_a_slice_is_drawn_from_its_own_shard():
  plan = solve(microbatch=6, shards=3, updates_per_epoch=2, timestep_fraction=1.0)
  chosen = batching.selections(plan, seed=0, iteration=0)
  for s in chosen:
    # Row k of a microbatch of six lies in shard k // 2, and so do columns 2 k and 2 k + 1.
    np.testing.assert_array_equal(s.example % 6 // 2, np.tile(np.arange(6) // 2, (len(s.i), 1)))
  for epoch in (chosen[0:2], chosen[2:4], chosen[4:6]):
    pairs = [pair for s in epoch for pair in zip(s.example.flat, s.i.flat, strict=True)]
    assert len(set(pairs)) == len(pairs) == plan.examples * len(STEPS)
  assert (chosen[0].example != chosen[2].example).any()


def test_pairs_of_a_prompt_stay_in_the_shard_of_its_images():
  fitting = dict(num_records=8, group_size=2, microbatch=8, updates_per_epoch=1)
  plan = solve(**fitting, count_examples=a_pair_each, shards=2)
  for s in batching.selections(plan, seed=0, iteration=0):
    # Four prompts a microbatch, two of them in each shard; two pairs of a slice are each shard's.
    np.testing.assert_array_equal(s.example % 4 // 2, np.tile([0, 0, 1, 1], (len(s.i), 1)))


def test_a_pair_of_each_record_halves_the_slices():
  fitting = dict(num_records=8, group_size=4, microbatch=8, updates_per_epoch=1)
  plan = solve(**fitting, count_examples=a_pair_each)
  assert (plan.examples, plan.width, plan.slice_size, plan.slices) == (8, 2, 4, 2 * 3)
  assert "8 pairs of images x 3 of 5 timesteps" in plan.describe("images")
  # An iteration of fewer pairs than a slice could hold has one slice.
  plan = solve(**{**fitting, "num_records": 4, "microbatch": 16}, count_examples=a_pair_each)
  assert (plan.slice_size, plan.slices) == (4, 3)


def test_the_best_and_the_worst_few_of_a_record_are_examples_of_their_own():
  fitting = dict(num_records=4, group_size=8, microbatch=8, updates_per_epoch=1)
  plan = solve(**fitting, count_examples=lambda P, K: (2 * P, 1), shards=1)
  assert (plan.examples, plan.width, plan.slice_size) == (8, 1, 8)
  (chosen, *_) = batching.selections(plan, 0, 0)
  assert collections.Counter(chosen.example.ravel().tolist()) == {k: 3 for k in range(8)}


def test_finished_samples_have_no_steps():
  plan = solve(steps=None, timestep_range=None, timestep_fraction=None)
  assert plan.steps == () and plan.timesteps == 1 and plan.slices == 4
  chosen = batching.selections(plan, 0, 0)
  assert all((s.i == 0).all() for s in chosen)
  assert collections.Counter(np.ravel([s.example for s in chosen]).tolist()) == {
    k: 3 for k in range(24)
  }
  with pytest.raises(ValueError, match=r"timestep_range: expected none, because config\.method tr"):
    solve(steps=None)


def test_the_shards_are_the_devices_unless_stated():
  assert solve(microbatch=6, devices=2).shards == 2
  assert solve(microbatch=6, devices=2, shards=6).shards == 6
  stated = batching.selections(solve(microbatch=6, devices=1, shards=2), seed=0, iteration=0)
  held = batching.selections(solve(microbatch=6, devices=2), seed=0, iteration=0)
  for one, other in zip(stated, held, strict=True):
    np.testing.assert_array_equal(one.example, other.example)


@pytest.mark.parametrize("changes, message", [
  (dict(devices=2), "microbatch: expected a multiple of 2, 2 devices, got 3"),
  (dict(microbatch=6, shards=4), "microbatch: expected a multiple of 4, 4 shards, got 6"),
  (dict(microbatch=6, shards=3, devices=2), "shards: expected 0, or a multiple of 2, the number"),
  (
    dict(num_records=8, group_size=2, microbatch=4, devices=4, count_examples=a_pair_each),
    "microbatch: expected a multiple of 8, 4 devices x 2 samples of a record, got 4",
  ),
])
def test_what_shards_cannot_share_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    solve(**{"updates_per_epoch": 1, **changes})
