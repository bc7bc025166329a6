"""The feeds that sample: pairs, finished samples, and labels of a method's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_feed import (
  FINISHED,
  NUM_STEPS,
  PAIRS,
  PAIRS_OF_STEPS,
  REWARDS,
  SEED,
  by_advantage,
  by_number,
  draw,
  every,
  record_value,
  rewards_of,
  starts,
)

from jaxalign import methods, steering
from jaxalign.labels.base import Labels


def test_pairs_are_of_one_noise_and_step_the_better_one_first(make_feed, stub):
  feed = make_feed(PAIRS_OF_STEPS, batch=PAIRS)
  drawn = draw(feed)
  assert starts(stub) == [[0, 0, 2, 2]] * 2
  assert drawn.record["preference/ties"] == 0.25
  batch = every(feed, drawn)
  n, i = batch.x_t[..., 0] // 100, batch.row.t
  # Of a tie, the third, both are the first sample, and it counts nothing; the others share its.
  pairs = {0: (1, 0, 4 / 3), 1: (3, 2, 4 / 3), 2: (4, 4, 0.0), 3: (7, 6, 4 / 3)}
  seen = sorted(zip((n[:, 0] // 2).tolist(), i.tolist(), strict=True))
  assert seen == [(k, s) for k in range(4) for s in (0, 2)]
  ids = feed.records.draw_for_step(SEED, 0, 4)
  for row, pair in enumerate((n[:, 0] // 2).astype(int)):
    best, worst, weight = pairs[pair]
    assert n[row].tolist() == [best, worst]
    assert batch.x_t[row, :, 0].tolist() == [100 * best + i[row], 100 * worst + i[row]]
    assert batch.x_s[row, :, 0].tolist() == [100 * best + i[row] + 1, 100 * worst + i[row] + 1]
    assert batch.cond[row, 0] == 10 * ids[pair] + 5
    assert batch.labels["weight"][row] == pytest.approx(weight)


def test_of_a_larger_group_the_first_best_and_the_first_worst_are_taken(make_feed, stub):
  batch = {"num_records": 2, "group_size": 4, "updates_per_epoch": 1}
  chosen, values = draw(make_feed(PAIRS_OF_STEPS, batch=batch)).data[2:]
  assert chosen.tolist() == [[1, 0], [7, 6]] and values["weight"].tolist() == [1.0, 1.0]
  assert starts(stub) == [[0, 0, 0, 0]] * 2



def test_finished_samples_come_with_their_record_and_label(make_feed):
  feed = make_feed(by_advantage(by="sample"), batch=FINISHED)
  assert feed.example == "sample" and "timesteps" not in feed.describe()
  batch = every(feed, draw(feed))
  n = (batch.x_0[:, 0] // 100).astype(int)
  assert sorted(n) == list(range(8))
  np.testing.assert_array_equal(batch.x_0[:, 0], 100 * n + NUM_STEPS)  # the end of the chain
  expected = np.array([-4, 4, -2, 2, 0, 0, -6, 6], np.float32)
  np.testing.assert_array_equal(batch.labels["advantages"], expected[n])
  own = 10 * np.repeat(feed.records.draw_for_step(SEED, 0, 4), 2) + 5
  np.testing.assert_array_equal(batch.cond[:, 0], own[n])


def test_pairs_of_finished_samples_are_of_one_record_the_better_one_first(make_feed):
  feed = make_feed(PAIRS_OF_STEPS._replace(by="sample"), batch={**PAIRS, **FINISHED})
  batch = every(feed, draw(feed))
  n = (batch.x_0[..., 0] // 100).astype(int)
  assert sorted(n.tolist()) == [[1, 0], [3, 2], [4, 4], [7, 6]]
  np.testing.assert_array_equal(batch.labels["gap"], REWARDS[n[:, 0]] - REWARDS[n[:, 1]])
  own = 10 * feed.records.draw_for_step(SEED, 0, 4) + 5
  np.testing.assert_array_equal(batch.cond[:, 0], own[n[:, 0] // 2])


def test_labels_may_be_random_and_remember_and_take_fewer_samples(make_feed):
  """One sample of each record by chance, and how many iterations there were."""

  def label(memory, scores, key):
    P, K = scores.total.shape
    k = jax.random.randint(key, (P,), 0, K)
    value = {"reward": scores.named["by_number"][jnp.arange(P), k]}
    return memory + 1, Labels(jnp.arange(P) * K + k, value, {"seen": memory + 1})

  data = methods.Rollouts(label, by="sample", memory=lambda count: jnp.float32(count))
  feed = make_feed(data, batch={**FINISHED, "updates_per_epoch": 1})
  first = draw(feed)
  assert first.record["seen"] == 5.0 and first.state.memory == 5.0  # from the four records
  batch = every(feed, first)
  n = (batch.x_0[:, 0] // 100).astype(int)
  assert sorted(n // 2) == [0, 1, 2, 3]
  np.testing.assert_array_equal(batch.labels["reward"], REWARDS[n])
  again = every(feed, draw(feed))
  np.testing.assert_array_equal(again.x_0, batch.x_0)  # the same step, the same choice
  others = [np.sort(every(feed, draw(feed, step)).x_0[:, 0]) for step in range(4)]
  assert len({tuple(other) for other in others}) > 1


def test_every_reward_reaches_the_label_by_its_name_and_weight(make_feed):
  found = []

  def label(memory, scores, key):
    found.append((sorted(scores.named), sorted(scores.weights)))
    values = {"mine": jnp.ravel(scores.weights["record_value"] * scores.named["record_value"])}
    return memory, Labels(jnp.arange(8), values, {})

  rewards = rewards_of(by_number, record_value, weights=(2.0, -1.0), normalize="batch")
  feed = make_feed(methods.Rollouts(label, by="sample"), rewards=rewards, batch=FINISHED)
  batch = every(feed, draw(feed))
  assert found[-1] == (["by_number", "record_value"],) * 2
  np.testing.assert_array_equal(batch.labels["mine"], -batch.cond[:, 0])


def test_finished_samples_may_come_from_any_sampler_and_steps_from_the_chain(make_feed, stub):
  stub.sampler = steering.Sampler(None, name="best_of_n")
  feed = make_feed(by_advantage(by="sample"), batch=FINISHED)
  batch = every(feed, draw(feed))
  assert sorted(batch.x_0[:, 0] % 100) == [NUM_STEPS] * 8
  for data, batch in ((by_advantage(), {}), (by_advantage(by="sample", kl_weight=0.1), FINISHED)):
    with pytest.raises(ValueError, match=r'config\.sampler: expected the chain(.|\n)*"best_of_n"'):
      make_feed(data, batch=batch)
