"""The feeds that sample: which record, noise, step and advantage, and by which parameters."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_feed import (
  FINISHED,
  MICROBATCH,
  NUM_STEPS,
  PAIRS,
  PAIRS_OF_STEPS,
  REWARDS,
  SEED,
  by_advantage,
  draw,
  every,
  starts,
  state_of,
)

from jaxalign import streams
from jaxalign.labels import advantages

TWO_RECORDS = {"num_records": 2, "updates_per_epoch": 1}


def test_every_transition_is_of_its_sample_with_its_record_and_advantage(make_feed):
  feed = make_feed()
  drawn = draw(feed)
  batch = every(feed, drawn)
  n, i = batch.x_t[:, 0] // 100, batch.row.t
  assert sorted(zip(n, i, strict=True)) == [(k, s) for k in range(8) for s in (0, 2)]
  np.testing.assert_array_equal(batch.x_t[:, 0], 100 * n + i)
  np.testing.assert_array_equal(batch.x_s[:, 0], 100 * n + i + 1)
  np.testing.assert_array_equal(batch.log_prob, -(10 * n + i))
  # A pair of samples of one record: each against the other.
  expected = np.array([-4, 4, -2, 2, 0, 0, -6, 6], np.float32)
  np.testing.assert_array_equal(batch.labels["advantages"], expected[n.astype(int)])
  drawn_ids = feed.records.draw_for_step(SEED, 0, 4)
  assert len(set(drawn_ids)) == 4
  own = 10 * np.repeat(drawn_ids, 2) + 5
  np.testing.assert_array_equal(batch.cond[:, 0], own[n.astype(int)])


def test_only_the_first_update_is_fresh(make_feed):
  feed = make_feed(batch={"num_epochs": 2})
  drawn = draw(feed)
  fresh = [np.unique(selection.fresh).tolist() for selection in drawn.selections]
  assert fresh == [[True], [False], [False], [False]]
  assert every(feed, drawn).fresh.tolist() == [True] * 8 + [False] * 24


def test_a_record_that_is_drawn_twice_is_one_group(make_feed):
  feed = make_feed(records=2)
  drawn = draw(feed)
  ids = feed.records.draw_for_step(SEED, 0, 4)
  assert sorted(ids) == [0, 0, 1, 1]
  expected = np.zeros(8, np.float32)
  for record in (0, 1):
    own = np.repeat(ids == record, 2)
    expected[own] = (REWARDS[own] - REWARDS[own].mean()) * 4 / 3  # against the other three
  np.testing.assert_allclose(drawn.data[3]["advantages"], expected, atol=1e-6)


def test_statistics_are_kept_by_record_and_carried_in_the_state(make_feed):
  kwargs = {"buffer_size": 4, "min_count": 4, "epsilon": 0.0, "limit": 100.0}
  feed = make_feed(by_advantage(advantages.make("per_prompt", **kwargs)), batch=TWO_RECORDS)
  rewards = REWARDS[:4]
  first = draw(feed)
  # With two rewards of a record each, those of the batch: mean 2, standard deviation sqrt(2.5).
  np.testing.assert_allclose(first.data[3]["advantages"], (rewards - 2) / np.sqrt(2.5), rtol=1e-6)
  ids = feed.records.draw_for_step(SEED, 0, 2)
  expected = np.zeros((4, 4), np.float32)
  expected[ids, :2] = rewards.reshape(2, 2)
  np.testing.assert_array_equal(first.state.memory.buffer, expected)
  again = feed.draw(first.state, 0)  # the same records once more, now with four rewards each
  np.testing.assert_allclose(again.data[3]["advantages"], [-1, 1, -1, 1], rtol=1e-6)
  assert again.state.memory.count[ids].tolist() == [4, 4]


def test_kl_is_taken_off_the_reward_at_its_weight_and_not_off_the_log(make_feed):
  feed = make_feed(by_advantage(kl_weight=0.5))
  drawn = draw(feed)
  # The second of each pair pays half a nat more than the first.
  expected = [-3.5, 3.5, -1.5, 1.5, 0.5, -0.5, -5.5, 5.5]
  np.testing.assert_array_equal(drawn.data[3]["advantages"], expected)
  assert drawn.record["kl/to_ref"] == 1.5
  assert drawn.record["reward/mean"] == drawn.record["reward/by_number"] == 3.5


def test_without_a_weight_no_kl_is_computed(make_feed, stub):
  stub.kl_fn = None  # would fail if it were called
  assert "kl/to_ref" not in draw(make_feed()).record


def test_every_microbatch_has_noise_of_its_own(make_feed, stub):
  feed = make_feed()
  for step in (0, 1):
    draw(feed, step)
  name = streams.number("rollout")
  assert stub.noise == [(SEED, name, i, j) for i in (0, 1) for j in (0, 1)]
  assert starts(stub) == [None] * 4  # and every sample has its own


def test_the_iteration_changes_the_records_and_their_order_of_training(make_feed):
  feed = make_feed()
  first, second = draw(feed, 0), draw(feed, 1)
  texts = [drawn.data[0][1].cond["text"].tolist() for drawn in (first, second)]
  assert texts[0] != texts[1]
  orders = [np.stack([s.example for s in drawn.selections]) for drawn in (first, second)]
  assert (orders[0] != orders[1]).any()


def test_the_gap_of_the_first_update_is_bounded(make_feed):
  feed = make_feed()

  def updates(gaps, ratios):
    return [
      {"policy/log_prob_gap": np.array(gap), "policy/ratio": np.array(ratio)}
      for gap, ratio in zip(gaps, ratios, strict=True)
    ]

  record = feed.summarize(updates([[0.0, 0.2, 0.0, 0.0], [9.0] * 4], [[1.0] * 4, [1.0, 3.0] * 2]))
  assert record["policy/log_prob_gap"] == 0.2 and record["policy/log_prob_gap_share"] == 0.25
  assert record["policy/ratio_mean"] == 1.5 and record["policy/first_ratio_max_error"] == 0.0
  assert feed.check(record, 7) is None
  large = feed.summarize(updates([[0.0, 0.6, 0.0, 0.0]], [[1.0] * 4]))
  problem = str(feed.check(large, 7))
  assert "iteration 7" in problem and "2 of 8 log-prob" in problem and "up to 6.0e-01" in problem
  many = feed.summarize(updates([[0.2, 0.2, 0.0, 0.0]], [[1.0] * 4]))
  assert "4 of 8 log-prob" in str(feed.check(many, 7))
  assert feed.check({"loss/total": 0.0}, 7) is None  # a method without log-probabilities


def test_a_loss_without_a_ratio_is_refused_a_second_update(make_feed):
  with pytest.raises(ValueError, match="no ratio to correct a second update"):
    make_feed(by_advantage(on_policy=True))
KINDS = {
  "steps": (by_advantage(), {}),
  "pairs of steps": (PAIRS_OF_STEPS, PAIRS),
  "finished": (by_advantage(by="sample"), FINISHED),
  "finished pairs": (PAIRS_OF_STEPS._replace(by="sample"), {**PAIRS, **FINISHED}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_a_draw(kind, make_feed):
  data, batch = KINDS[kind]
  feed = make_feed(data, batch=batch)
  drawn = draw(feed)
  data, selection = feed.shapes(state_of(feed))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), data) == jax.tree.map(
    lambda x: (x.shape, x.dtype), drawn.data
  )
  shapes = [leaf.shape for leaf in selection]
  assert shapes == [leaf.shape for leaf in drawn.selections[0]]


def test_a_batch_has_steps_where_the_method_trains_them_and_only_there(make_feed):
  with pytest.raises(ValueError, match=r"timestep_range: expected none, because config\.method tr"):
    make_feed(by_advantage(by="sample"))
  with pytest.raises(ValueError, match="timestep_fraction: expected a value, got None"):
    make_feed(batch={"timestep_fraction": None})


def test_the_policy_samples_or_the_copy_that_the_method_names(make_feed, stub):
  feed = make_feed()
  feed.draw(state_of(feed, {"w": 1.0}, old={"w": 2.0}), 0)
  feed = make_feed(by_advantage(sampled_by="old"), copies=("old",))
  drawn = feed.draw(state_of(feed, {"w": 1.0}, old={"w": 2.0}), 0)
  assert [params["w"] for params in stub.sampled_with] == [1.0, 1.0, 2.0, 2.0]
  # Whose ratio to the policy is not 1 by construction, and whose gap is not an error.
  assert not np.any([selection.fresh for selection in drawn.selections])
  values = {"policy/ratio": np.ones(4), "policy/log_prob_gap": np.full(4, 9.0)}
  assert feed.check(feed.summarize([values]), 0) is None
  with pytest.raises(ValueError, match=r"sampled_by: expected one of policy, got 'old'"):
    make_feed(by_advantage(sampled_by="old"))


def test_a_reference_that_is_a_copy_is_what_the_kl_is_to(make_feed, stub):
  stub.frozen = {"base": "base", "reference": "the start"}
  stub.policy = types.SimpleNamespace(variables=lambda params, base: (params["w"], base))
  references = []

  def kl_fn(params, frozen, sampled, table):
    references.append(frozen["reference"])
    return jnp.zeros(MICROBATCH)

  stub.kl_fn = kl_fn
  feed = make_feed(by_advantage(kl_weight=0.5))
  feed.draw(state_of(feed), 0)
  feed.draw(state_of(feed, reference={"w": 7.0}), 1)
  assert references == ["the start"] * 2 + [(7.0, "base")] * 2


def test_a_window_of_noise_moves_over_the_steps_and_trains_no_others(make_feed, stub):
  def window(iteration):
    return np.eye(NUM_STEPS, dtype=np.float32)[[0, 2, 2][iteration]]

  feed = make_feed(by_advantage(window=window))
  assert "x 1 of 1 timesteps" in feed.describe()
  for iteration, step in enumerate((0, 2, 2)):
    drawn = draw(feed, iteration)
    assert np.unique([selection.i for selection in drawn.selections]).tolist() == [step]
    batch = every(feed, drawn)
    assert (batch.row.t == step).all() and (batch.row.noise_scale == 1).all()
  expected = [[1, 0, 0], [0, 0, 1], [0, 0, 1]]  # two microbatches each
  np.testing.assert_array_equal(stub.scales, np.repeat(expected, 2, axis=0))


def test_a_window_with_another_number_of_steps_is_refused(make_feed):
  feed = make_feed(by_advantage(window=lambda i: np.array([1, 0, i], np.float32)))
  draw(feed, 0)
  with pytest.raises(ValueError, match=r"expected 1 steps with noise .*, found 2 in iteration 1"):
    draw(feed, 1)
