"""Rewards scored where samples lie: each with its own record, and nothing unfit gets through."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.records import RecordSet
from jaxalign.distributed import sharding
from jaxalign.modalities import points
from jaxalign.modalities.points import POINTS
from jaxalign.rewards import combine, contract, scoring

MESH = sharding.one_device()
RECORDS = [{"goal": 10.0 * i} for i in range(4)]
IDS = np.array([3, 0, 2, 2, 1, 3])  # of three microbatches of two
# Sample k is (its record's goal, k).
SAMPLES = np.stack([10.0 * IDS, np.arange(6.0)], axis=1).astype(np.float32)
POOL = {"num_threads": 1}


class Device:
  """scale (goal + 100 k), which counts how often records are encoded."""

  def __init__(self, name="device", scale=2.0):
    self.encoded = 0
    self.reward = contract.DeviceReward(name, {"scale": np.float32(scale)}, self.encode, self.score)

  def encode(self, records):
    self.encoded += 1
    return {"goal": np.array([record["goal"] for record in records], np.float32)}

  @staticmethod
  def score(params, samples, query):
    assert samples.dtype == jnp.float32
    return params["scale"] * (query["goal"] + 100 * samples[:, 1])


def on_host(samples, records):
  assert [record["goal"] for record in records] == samples[:, 0].tolist()
  return samples[:, 1]


def total_of(*rewards):
  """Rewards by themselves, functions of the host by their name."""
  made = [
    contract.Reward(reward.name, None, reward)
    if isinstance(reward, contract.DeviceReward)
    else contract.Reward(reward.__name__, reward)
    for reward in rewards
  ]
  return combine.WeightedRewards(tuple(made), (1.0,) * len(made), "none")


def gather(total, modality=POINTS, samples=SAMPLES, **pool):
  """All three microbatches, submitted before one is fetched."""
  total = scoring.placed(total, MESH)
  query = total.encode(RECORDS)
  on_mesh = scoring.OnMesh(total, modality, MESH)
  records = RecordSet(tuple(RECORDS))
  with scoring.Scorer(total, on_mesh, records, query, **{**POOL, **pool}) as scorer:
    pending = [
      scorer.submit(jax.device_put(part, sharding.batch(MESH)), ids)
      for part, ids in zip(np.split(samples, 3), np.split(IDS, 3), strict=True)
    ]
    return scorer.gather(pending)


def test_each_sample_is_scored_with_its_own_record_and_records_are_encoded_once():
  device = Device()
  found = gather(total_of(device.reward))
  np.testing.assert_array_equal(found["device"], 2 * (10.0 * IDS + 100 * np.arange(6)))
  assert found["device"].dtype == np.float32 and device.encoded == 1


def test_rewards_keep_their_order_wherever_they_are_scored():
  found = gather(total_of(on_host, Device("b").reward, Device("a", scale=1.0).reward))
  assert list(found) == ["on_host", "b", "a"]
  np.testing.assert_array_equal(found["on_host"], np.arange(6))
  np.testing.assert_array_equal(found["b"], 2 * found["a"])


def fails(samples):
  raise AssertionError("samples were brought to the host")


def test_nothing_is_brought_to_the_host_for_rewards_on_the_mesh(monkeypatch):
  monkeypatch.setattr(sharding, "held_rows", fails)
  monkeypatch.setattr(sharding, "gather", fails)
  gather(total_of(Device().reward), POINTS._replace(check=fails))


def test_without_a_check_in_programs_samples_are_checked_in_the_pool():
  threads = []

  def check(samples):
    threads.append(threading.current_thread())
    points.check(samples)

  modality = POINTS._replace(check=check, fit=None)
  assert list(gather(total_of(Device().reward), modality)) == ["device"]
  assert len(threads) == 3 and threading.main_thread() not in threads
  with pytest.raises(contract.RewardError, match="1 of 2 with NaN or inf") as caught:
    gather(total_of(Device().reward), modality, unfit(3))
  np.testing.assert_array_equal(caught.value.sample, unfit(3)[3])


def unfit(k):
  """The samples with a NaN in one that the reward does not look at."""
  samples = SAMPLES.copy()
  samples[k, 0] = np.nan
  return samples


def test_a_nan_sample_is_refused_and_comes_along_though_its_reward_is_a_number():
  with pytest.raises(contract.RewardError, match=r"expected finite points, got 1 of 2") as caught:
    gather(total_of(Device().reward), samples=unfit(3))
  np.testing.assert_array_equal(caught.value.sample, unfit(3)[3])
  assert caught.value.index == 1


def test_samples_of_another_rank_are_refused():
  with pytest.raises(contract.RewardError, match=r"expected points \[N, D\].*\(2, 2, 1\)"):
    gather(total_of(Device().reward), samples=SAMPLES[..., None])


def test_a_reward_that_is_not_finite_brings_its_sample():
  bad = Device().reward._replace(score=lambda params, x, query: jnp.log(x[:, 1] - 3.0))
  with pytest.raises(contract.RewardError, match=r'"device": 2 of 2 .*first is nan') as caught:
    gather(total_of(bad))
  np.testing.assert_array_equal(caught.value.sample, SAMPLES[0])


@pytest.mark.parametrize("score, message", [
  (lambda params, x, query: x, r'"device": expected shape \(2,\), one number .* got \(2, 2\)'),
  (lambda params, x, query: x.mean(), r'"device": expected shape \(2,\), one number .* got \(\)'),
  (lambda params, x, query: x[:, 1] * 1j, r'"device": expected numbers, got dtype complex64'),
  (lambda params, x, query: query["gaol"], r'reward "device" failed: KeyError: .gaol.'),
])
def test_what_a_reward_should_not_do_is_named(score, message):
  with pytest.raises(contract.RewardError, match=message):
    gather(total_of(Device().reward._replace(score=score)))


@pytest.mark.parametrize("encode, message", [
  (lambda records: np.zeros(3), r'"device": .*arrays of 4 rows, one a record, found shape \(3,\)'),
  (lambda records: {"a": 1.0}, r"found shape \(\)"),
  (lambda records: records[0]["gaol"], r'reward "device" failed: KeyError'),
])
def test_what_encode_should_not_return_is_named(encode, message):
  with pytest.raises(ValueError, match=message):
    total_of(Device().reward._replace(encode=encode)).encode(RECORDS)


@pytest.mark.parametrize("value", [2.0, np.float64(2.0), np.float32(2.0), jnp.float32(2.0)])
def test_parameters_are_placed_once_whatever_they_were(value):
  placed = scoring.placed(total_of(Device().reward._replace(params={"scale": value})), MESH)
  again = scoring.placed(placed, MESH)
  assert again.params["device"]["scale"] is placed.params["device"]["scale"]
  found = gather(placed)["device"]
  np.testing.assert_array_equal(found, 2 * (10.0 * IDS + 100 * np.arange(6)))


def test_one_of_the_same_name_and_arguments_is_not_made_again():
  first = combine.make_total(("gaussian_quadratic",), kwargs=({"slope": (1.0, 1.0)},))
  same = combine.make_total(
    ("gaussian_quadratic",), kwargs=({"slope": (1.0, 1.0)},), known=first.rewards
  )
  assert same.rewards[0] is first.rewards[0]
  other = combine.make_total(("gaussian_quadratic",), known=first.rewards)
  assert other.rewards[0] is not first.rewards[0]


# ---- abstention


def of_even(samples, records):
  """2 k, and no verdict on samples 1 and 3, under whose mask a NaN lies."""
  k = samples[:, 1]
  without = (k == 1) | (k == 3)
  return np.ma.masked_array(np.where(without, np.nan, 2 * k), without)


def test_what_is_masked_is_no_number():
  found = gather(total_of(of_even, Device().reward), max_abstained=0.5)
  np.testing.assert_array_equal(found["of_even"], [0, np.nan, 4, np.nan, 8, 10])
  assert not np.isnan(found["device"]).any()


def test_more_abstentions_than_borne_stop_the_run():
  with pytest.raises(contract.RewardError, match=r'of "of_even" on 2 of 6 samples') as caught:
    gather(total_of(on_host, of_even))
  assert "at most 0 of them, config.reward_pool.max_abstained, found 0.333" in str(caught.value)
  gather(total_of(on_host, of_even), max_abstained=1 / 3)
  with pytest.raises(ValueError, match="max_abstained: expected a share from 0 to 1, got 3"):
    gather(total_of(on_host), max_abstained=3)


def test_a_mask_is_no_excuse_for_other_values():
  def half(samples, records):
    return np.ma.masked_array([np.nan, np.nan], [True, False])

  with pytest.raises(contract.RewardError, match=r'"half": 1 of 2 .*first is nan at index 1'):
    gather(total_of(half), max_abstained=1.0)


def test_a_sample_is_valid_unless_a_reward_that_counts_abstained():
  built = tuple(contract.Reward(name, None) for name in "abc")
  named = {
    "a": np.float32([1, np.nan, 3, 5]),
    "b": np.float32([10, 20, 30, 40]),
    "c": np.float32([np.nan, 1, np.nan, np.nan]),
  }
  total = combine.WeightedRewards(built, (2.0, -1.0, 0.0), "none")
  np.testing.assert_array_equal(total.valid(named), [True, False, True, True])
  np.testing.assert_array_equal(total.total(named), np.float32([-8, np.nan, -24, -30]))
  np.testing.assert_array_equal(total.raw(named), [-8, np.nan, -24, -30])
  # a: mean 3, std sqrt(8 / 3), and b: 80 / 3, squares (50^2 + 10^2 + 40^2) / 9, of valid ones.
  normal = combine.WeightedRewards(built, (2.0, -1.0, 0.0), "batch")
  a = np.array([-2, 0, 2]) / np.sqrt(8 / 3)
  b = np.array([-50, 10, 40]) / 3 / np.sqrt((2500 + 100 + 1600) / 27)
  np.testing.assert_allclose(normal.total(named)[[0, 2, 3]], 2 * a - b, rtol=1e-6)
  nothing = {name: np.full(4, np.nan, np.float32) for name in "abc"}
  assert np.isnan(normal.total(nothing)).all() and not normal.valid(nothing).any()
