"""The feeds that sample: rewards on the host and on the mesh, what is rejected, and no verdict."""

import numpy as np
import pytest
from toy_feed import REWARDS, SEED, by_number, draw, record_value, rewards_of

from jaxalign.rewards import combine, contract


def test_rewards_are_logged_raw_and_normalised_in_the_advantage(make_feed):
  rewards = rewards_of(by_number, record_value, weights=(2.0, -1.0), normalize="batch")
  drawn = draw(make_feed(rewards=rewards))
  assert drawn.record["reward/by_number"] == 3.5 and drawn.record["reward/record_value"] == 20.0
  assert drawn.record["reward/mean"] == 2 * 3.5 - 20.0
  # The reward of a record is the same for both of its samples, so that it drops out.
  expected = 2 * np.array([-4, 4, -2, 2, 0, 0, -6, 6]) / REWARDS.std()
  np.testing.assert_allclose(drawn.data[3]["advantages"], expected, rtol=1e-5)


def nan_of_the_sixth(samples, records):
  return np.where(samples[:, 1] == 6, np.nan, 0.0)


@pytest.mark.parametrize("unfit, reward, reason", [
  (6, by_number, "it is unfit"), (None, nan_of_the_sixth, "1 of 4 values are not finite")
])
def test_a_rejected_sample_is_saved_and_named(unfit, reward, reason, make_feed, stub, tmp_path):
  stub.unfit = unfit
  feed = make_feed(rewards=rewards_of(reward))
  with pytest.raises(contract.RewardError, match=f"iteration 5: .*{reason}") as error:
    draw(feed, 5)
  path = tmp_path / "rejected_step_000005" / "0000.npy"
  assert str(path) in str(error.value)
  own = 10 * feed.records.draw_for_step(SEED, 5, 4)[3] + 5  # n = 6 is of the fourth record
  np.testing.assert_array_equal(np.load(path), [[own, 6]])


def device_by_number():
  """The table's reward plus 1000 times what is wrong with the record that it is asked of."""

  def score(params, samples, query):
    wrong = samples[:, 0] - query["value"]
    return params["table"][samples[:, 1].astype(int)] + 1000.0 * wrong

  def encode(records):
    return {"value": np.array([record["value"] for record in records], np.float32)}

  device = contract.DeviceReward("on_mesh", {"table": REWARDS}, encode, score)
  return contract.Reward("on_mesh", None, device)


def test_rewards_on_the_mesh_are_asked_of_their_own_records(make_feed):
  rewards = combine.WeightedRewards((device_by_number(),), (1.0,), "none")
  drawn = draw(make_feed(rewards=rewards))
  np.testing.assert_array_equal(drawn.data[3]["advantages"], [-4, 4, -2, 2, 0, 0, -6, 6])
  assert drawn.record["reward/on_mesh"] == 3.5 and "reward/abstained" not in drawn.record
  both = (device_by_number(), contract.Reward("by_number", by_number))
  drawn = draw(make_feed(rewards=combine.WeightedRewards(both, (1.0, 1.0), "none")))
  np.testing.assert_array_equal(drawn.data[3]["advantages"], [-8, 8, -4, 4, 0, 0, -12, 12])
  assert drawn.record["reward/abstained"] == 0.0


def test_a_sample_that_a_reward_on_the_mesh_rejects_is_saved(make_feed, tmp_path):
  made = device_by_number()
  bad = made.device._replace(params={"table": np.where(REWARDS == 2, np.inf, REWARDS)})
  rewards = combine.WeightedRewards((made._replace(device=bad),), (1.0,), "none")
  feed = make_feed(rewards=rewards)
  with pytest.raises(contract.RewardError, match=r"iteration 5: .*1 of 4 values") as error:
    draw(feed, 5)
  path = tmp_path / "rejected_step_000005" / "0000.npy"
  assert str(path) in str(error.value)
  own = 10 * feed.records.draw_for_step(SEED, 5, 4)[3] + 5
  np.testing.assert_array_equal(np.load(path), [[own, 6]])


def test_records_that_a_reward_on_the_mesh_cannot_use_are_named_at_once(make_feed):
  made = device_by_number()
  device = made.device._replace(encode=lambda records: records[0]["goal"])
  rewards = combine.WeightedRewards((made._replace(device=device),), (1.0,), "none")
  with pytest.raises(ValueError, match=r"config\.data\.source: reward .on_mesh. failed: KeyError"):
    make_feed(rewards=rewards)


def picky(samples, records):
  """The table's reward, with no verdict on the samples 1, 4 and 5."""
  n = samples[:, 1].astype(int)
  return np.ma.masked_array(REWARDS[n], np.isin(n, [1, 4, 5]))


POOL = {"num_threads": 1, "max_abstained": 0.5}


def test_what_has_no_verdict_is_not_trained_on_and_not_logged(make_feed):
  feed = make_feed(rewards=rewards_of(picky), reward_pool=POOL)
  drawn = draw(feed)
  np.testing.assert_array_equal(drawn.data[3]["advantages"], [0, 0, -2, 2, 0, 0, -6, 6])
  known = np.array([0, 1, 3, 2, 8])
  for name in ("reward/mean", "reward/picky"):
    assert drawn.record[name] == pytest.approx(known.mean())
  assert drawn.record["reward/std"] == pytest.approx(known.std())
  assert drawn.record["reward/abstained"] == 3 / 8
  assert drawn.record["reward/flat_groups"] == 0.5  # one with one verdict, one with none


def test_a_reward_that_only_is_logged_may_have_no_verdict(make_feed):
  rewards = rewards_of(by_number, picky, weights=(1.0, 0.0))
  drawn = draw(make_feed(rewards=rewards, reward_pool=POOL))
  np.testing.assert_array_equal(drawn.data[3]["advantages"], [-4, 4, -2, 2, 0, 0, -6, 6])
  assert drawn.record["reward/mean"] == 3.5
  assert drawn.record["reward/picky"] == pytest.approx(2.8)
  assert drawn.record["reward/abstained"] == 3 / 8


def test_means_of_nothing_are_not_defined(make_feed):
  def silent(samples, records):
    return np.ma.masked_all(len(samples))

  feed = make_feed(rewards=rewards_of(silent), reward_pool={**POOL, "max_abstained": 1.0})
  drawn = draw(feed)
  assert not drawn.data[3]["advantages"].any()
  for name in ("reward/mean", "reward/std", "reward/silent"):
    assert drawn.record[name] is None
  assert drawn.record["reward/abstained"] == drawn.record["reward/flat_groups"] == 1.0


def test_abstentions_stop_a_run_unless_it_bears_them(make_feed):
  with pytest.raises(contract.RewardError, match=r'iteration 2: .*"picky" on 3 of 8') as error:
    draw(make_feed(rewards=rewards_of(picky)), 2)
  assert "config.reward_pool.max_abstained" in str(error.value)


def test_a_misspelt_field_of_the_pool_is_named(make_feed):
  with pytest.raises(ValueError, match=r"config\.reward_pool: .*did you mean .num_retries."):
    make_feed(reward_pool={"num_threads": 1, "num_retrys": 2})
