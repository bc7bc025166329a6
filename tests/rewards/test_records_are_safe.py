"""What a reward does to its records and samples, no other reward and no later iteration sees."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.modalities.image import IMAGES
from jaxalign.rewards import combine, contract, pool, retry

RECORDS = [
  {"prompt": "a Cat", "tags": ["oil", "soft"], "meta": {"seed": 1}},
  {"prompt": "a Dog", "tags": [], "meta": {"seed": 2}},
]
IMAGES_OF = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)


def assigns(record):
  record["prompt"] = record["prompt"].lower()


def pops(record):
  record.pop("prompt")


def reaches_in(record):
  record["tags"].append("seen")
  record["meta"]["seed"] = 0


def clears(record):
  record.clear()


# huggingface/trl PR#6534 is near: user functions are user code, and edit what they are given.
CHANGES = [assigns, pops, reaches_in, clears]


def weighted(*functions):
  rewards = tuple(contract.Reward(f"r{i}", function) for i, function in enumerate(functions))
  return combine.WeightedRewards(rewards, (1.0,) * len(rewards), "none")


@pytest.mark.parametrize("change", CHANGES)
def test_a_reward_that_changes_its_records_changes_its_own(change):
  records, seen = copy.deepcopy(RECORDS), []

  def first(samples, records):
    for record in records:
      change(record)
    return samples.mean((1, 2, 3))

  def second(samples, records):
    seen.append(copy.deepcopy(list(records)))
    return np.zeros(len(samples))

  total = weighted(first, second)
  for _ in range(3):
    total.on_host(IMAGES_OF, records)
  assert records == RECORDS and seen == [RECORDS] * 3


def test_a_reward_that_changes_the_list_changes_its_own():
  def first(samples, records):
    records.reverse()
    records.pop()
    return np.zeros(2)

  records = copy.deepcopy(RECORDS)
  weighted(first).on_host(IMAGES_OF, records)
  assert records == RECORDS


def test_another_attempt_sees_what_was_asked_for():
  """verl-project/verl-omni PR#366: a reward that fails half way is asked again."""
  seen = []

  def fails_once(samples, records):
    seen.append(records[0]["prompt"])
    records[0]["prompt"] = "changed"
    if len(seen) == 1:
      raise ConnectionError("refused")
    return np.zeros(2)

  again = retry.make(num_retries=1, retry_seconds=0.0)
  weighted(fails_once).on_host(IMAGES_OF, copy.deepcopy(RECORDS), again)
  assert seen == ["a Cat", "a Cat"]


def test_threads_that_share_records_do_not_meet_in_them():
  """The same record is in many microbatches of a run at once."""
  records = copy.deepcopy(RECORDS)

  def slow(samples, given):
    for _ in range(50):
      assert given[0]["prompt"] in ("a Cat", "changed")
      given[0]["prompt"] = "changed"
    return np.zeros(2)

  with pool.RewardPool(weighted(slow), IMAGES.check, num_threads=4) as scoring:
    scoring.gather([scoring.submit(IMAGES_OF, records) for _ in range(16)])
  assert records == RECORDS


def test_a_reward_on_the_device_encodes_records_of_its_own():
  def encode(records):
    for record in records:
      record["prompt"] = ""
    return np.zeros((len(records), 1), np.float32)

  device = contract.DeviceReward("mine", {}, encode, lambda params, x, query: x.mean((1, 2, 3)))
  total = combine.WeightedRewards((contract.Reward("mine", None, device),), (1.0,), "none")
  records = copy.deepcopy(RECORDS)
  for reward in (total, total.device):
    reward.encode(records)
  assert records == RECORDS


def test_samples_cannot_be_written_to():
  images = IMAGES_OF.copy()

  def paints(samples, records):
    samples[:] = 0.0
    return np.zeros(2)

  with pytest.raises(contract.RewardError, match='"r0" failed: ValueError: assignment destination'):
    weighted(paints).on_host(images, RECORDS)
  np.testing.assert_array_equal(images, IMAGES_OF)
  images[:] = 0.0  # whoever made them still may


@pytest.mark.parametrize(
  "values",
  [
    np.array([True, False, True]),
    [True, False, True],
    [np.True_, np.False_, np.True_],
    jnp.array([True, False, True]),
    np.ma.masked_array([True, False, True], mask=[False] * 3),
  ],
)
def test_true_and_false_are_one_and_zero(values):
  """Near huggingface/trl#6533: a reward that says whether a picture is right."""
  found = contract.check_rewards("mine", values, 3)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, [1.0, 0.0, 1.0])


def test_a_verdict_that_is_withheld_is_no_false():
  found = contract.check_rewards("mine", np.ma.masked_array([True, False], mask=[0, 1]), 2)
  np.testing.assert_array_equal(found, [1.0, np.nan])
