"""The feeds that sample, on a system of a few numbers: which record, reward, noise and advantage.

A sample says what it was asked: its record, and which of an iteration's samples it is, n. Rewards
are a table by n, so that every advantage can be worked out by hand.
"""

import contextlib
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods, steering, streams
from jaxalign.diffusion import guidance, rollout, schedules
from jaxalign.distributed import sharding
from jaxalign.labels import advantages, pairs
from jaxalign.labels.base import Labels
from jaxalign.modalities.modality import Modality, SampleError
from jaxalign.rewards import combine, contract
from jaxalign.training.feeds import online
from jaxalign.training.state import TrainState

SEED, MICROBATCH, NUM_STEPS = 3, 4, 3
REWARDS = np.array([0, 4, 1, 3, 5, 5, 2, 8], np.float32)  # of the samples of an iteration
# Step s has t = s.
TABLE = schedules.StepTable(
  *[np.arange(NUM_STEPS, dtype=np.float32)] * 5, noise_scale=np.ones(NUM_STEPS, np.float32)
)
# Two updates of four samples, each on both of the steps that have noise, in two slices.
BATCH = {
  "num_records": 4,
  "group_size": 2,
  "microbatch": MICROBATCH,
  "updates_per_epoch": 2,
  "num_epochs": 1,
  "timestep_range": (0.0, 1.0),
  "timestep_fraction": 1.0,
}
TWO_RECORDS = {"num_records": 2, "updates_per_epoch": 1}
LEAVE_ONE_OUT = advantages.make("leave_one_out", limit=100.0)


def by_advantage(estimator=LEAVE_ONE_OUT, **changes):
  label = advantages.of_every_sample(estimator)
  return methods.Rollouts(label, memory=estimator.init)._replace(**changes)


PAIRS_OF_STEPS = methods.Rollouts(pairs.best_and_worst, shared_noise=True)


class Stub:
  """A `System` whose trajectories are numbers: `x[s]` of sample n is 100 n + s."""

  def __init__(self):
    self.noise, self.starts, self.sampled_with, self.scales = [], [], [], []
    self.mesh, self.frozen = sharding.one_device(), {}
    # Only steps whose noise is scaled to something have any, and the second is never one.
    self.process = types.SimpleNamespace(transition=self.transition)
    self.pipeline = types.SimpleNamespace(table=TABLE)
    self.unfit = None  # the sample n that no reward may see
    modality = Modality("numbers", self.check, {}, None, self.write)
    self.model = types.SimpleNamespace(modality=modality)
    self.sampler = steering.Sampler(None, keeps_trajectory=True, name="stub")

  @staticmethod
  def transition(x_t, prediction, row):
    return x_t, np.where(row.t == 1, 0.0, row.noise_scale)[:, None]

  @staticmethod
  def tokenize(records):
    return np.array([[record["value"]] for record in records], np.float32)

  def sample_fn(self, params, frozen, tokens, seed, name, i, j, start, table):
    self.noise.append((seed, name, i, j))
    self.starts.append(start)
    self.sampled_with.append(params)
    self.scales.append(table.noise_scale)
    n = MICROBATCH * j + jnp.arange(float(len(tokens)))
    steps = jnp.append(table.t, NUM_STEPS)[:, None]
    rolled = rollout.Rollout(x=(100 * n + steps)[..., None], log_prob=-(10 * n + steps[:-1]))
    cond = guidance.Guided({"text": jnp.asarray(tokens)}, {"text": jnp.zeros((1, 1))})
    samples = jnp.stack([tokens[:, 0], n], axis=1)
    samples = jax.device_put(samples, sharding.batch(self.mesh))
    keeps = self.sampler.keeps_trajectory
    return steering.Sampled(rolled if keeps else None, cond, samples, x_0=rolled.x_0)

  @staticmethod
  def kl_fn(params, frozen, sampled, table):
    assert table.t.tolist() == TABLE.t.tolist()
    return 1.0 + sampled.samples[:, 1] % 2  # 1 nat of every even sample, 2 of every odd one

  def check(self, samples):
    if self.unfit in samples[:, 1]:
      raise SampleError("it is unfit", index=int(np.argmax(samples[:, 1] == self.unfit)))

  @staticmethod
  def write(samples, folder):
    np.save(folder / "0000.npy", samples)
    return [folder / "0000.npy"]


def by_number(samples, records):
  """The table's reward, of a sample that comes with its own record."""
  assert [record["value"] for record in records] == samples[:, 0].tolist()
  return REWARDS[samples[:, 1].astype(int)]


def record_value(samples, records):
  return np.array([record["value"] for record in records], np.float32)


def rewards_of(*functions, weights=(1.0,), normalize="none"):
  made = tuple(contract.Reward(function.__name__, function) for function in functions)
  return combine.WeightedRewards(made, weights, normalize)


BY_NUMBER = rewards_of(by_number)


@pytest.fixture
def stub():
  return Stub()


@pytest.fixture
def make_feed(stub, tmp_path):
  """Record i of four is of value 10 i + 5, and is known by it."""
  with contextlib.ExitStack() as opened:

    def make(data=None, rewards=BY_NUMBER, records=4, copies=(), **changes):
      lines = [json.dumps({"prompt": "x", "value": 10 * i + 5}) for i in range(records)]
      (tmp_path / "records.jsonl").write_text("\n".join(lines))
      batch = {**BATCH, **changes.pop("batch", {})}
      sections = {
        "seed": SEED,
        "data": {"source": str(tmp_path / "records.jsonl")},
        "batch": {name: value for name, value in batch.items() if value is not None},
        "reward_pool": {"num_threads": 1},
        "exactness": {"max_log_prob_gap": 0.5, "tolerance": 0.1, "max_share": 0.25},
        **changes,
      }
      setup = types.SimpleNamespace(
        sections=sections, system=stub, rewards=rewards, copies=dict.fromkeys(copies)
      )
      return opened.enter_context(online.Online(setup, data or by_advantage(), tmp_path))

    yield make


def state_of(feed, params=None, **copies):
  return TrainState(
    jnp.zeros((), jnp.int32), params or {}, None, {}, {}, copies, feed.init_memory()
  )


def starts(stub):
  """Of every microbatch: which noise its samples start from."""
  return [None if start is None else start.tolist() for start in stub.starts]


def draw(feed, step=0):
  return feed.draw(state_of(feed), step)


def every(feed, drawn):
  """The batches of all slices of all updates, as one of numpy arrays."""
  parts = []
  for selection in drawn.selections:
    for k in range(len(selection.example)):
      one = jax.tree.map(lambda leaf, k=k: leaf[k], selection)
      batch = feed.select(drawn.data, one)
      cond = batch.cond.cond if isinstance(batch, methods.Steps) else batch.cond
      parts.append(dataclasses.replace(batch, cond=cond["text"]))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


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


def test_rewards_are_logged_raw_and_normalised_in_the_advantage(make_feed):
  rewards = rewards_of(by_number, record_value, weights=(2.0, -1.0), normalize="batch")
  drawn = draw(make_feed(rewards=rewards))
  assert drawn.record["reward/by_number"] == 3.5 and drawn.record["reward/record_value"] == 20.0
  assert drawn.record["reward/mean"] == 2 * 3.5 - 20.0
  # The reward of a record is the same for both of its samples, so that it drops out.
  expected = 2 * np.array([-4, 4, -2, 2, 0, 0, -6, 6]) / REWARDS.std()
  np.testing.assert_allclose(drawn.data[3]["advantages"], expected, rtol=1e-5)


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


def test_a_loss_without_a_ratio_is_refused_a_second_update(make_feed):
  with pytest.raises(ValueError, match="no ratio to correct a second update"):
    make_feed(by_advantage(on_policy=True))


PAIRS = {"num_records": 4, "group_size": 2, "updates_per_epoch": 1}


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


FINISHED = {"timestep_range": None, "timestep_fraction": None}  # fields that a batch has not
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


# ---- rewards on the mesh, and without a verdict


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
