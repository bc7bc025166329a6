"""The feed of records on a system of a few numbers: what a loss sees of a record is all of one."""

import json
import types

import jax
import numpy as np
import pytest

from jaxalign.diffusion import guidance
from jaxalign.distributed import sharding
from jaxalign.rewards import combine, contract
from jaxalign.training.feeds import records

SEED = 3

# In the place of a model: a record is known by the length of its text.
SYSTEM = types.SimpleNamespace(
  mesh=sharding.one_device(),
  frozen={},
  model=types.SimpleNamespace(
    modality=types.SimpleNamespace(unit="numbers"),
    tokenize=lambda given: np.array([[len(record["prompt"])] for record in given], np.int32),
  ),
  condition_fn=lambda frozen, ids: guidance.Guided({"text": ids}, {"text": np.zeros((1, 1))}),
)
# Two rewards that want to know other things of a record: their queries stay apart.
LENGTH = contract.DeviceReward(
  "length",
  {"scale": np.float32(2.0)},
  lambda given: np.array([len(record["prompt"]) for record in given], np.float32),
  lambda params, samples, query: params["scale"] * samples * query,
)
GOAL = LENGTH._replace(
  name="goal",
  params={},
  encode=lambda given: np.array([[record["goal"]] * 2 for record in given], np.float32),
)
REWARDS = combine.WeightedRewards(
  tuple(contract.Reward(device.name, None, device) for device in (LENGTH, GOAL)), (1.0, 1.0), "none"
)


@pytest.fixture
def feed(tmp_path):
  """Record i has a text of length i + 1 and the goal 10 i."""
  lines = [json.dumps({"prompt": "x" * (i + 1), "goal": 10 * i}) for i in range(6)]
  (tmp_path / "records.jsonl").write_text("\n".join(lines))
  sections = {
    "seed": SEED,
    "batch": {"num_examples": 6, "microbatch": 2},
    "data": {"source": str(tmp_path / "records.jsonl")},
  }
  return records.RecordBatches(setup_of(sections, REWARDS))


def setup_of(sections, rewards):
  return types.SimpleNamespace(sections=sections, system=SYSTEM, rewards=rewards)


def examples(feed, step):
  """Of every slice of a step: the lengths of the texts, and both queries."""
  drawn = feed.draw(None, step)
  (selection,) = drawn.selections
  assert selection.shape == (3, 2)
  batches = [feed.select(drawn.data, rows) for rows in selection]
  assert all(batch.cond.uncond["text"].tolist() == [[0.0]] for batch in batches)
  lengths = [batch.cond.cond["text"][:, 0] for batch in batches]
  return (
    np.stack(lengths),
    np.stack([batch.query["length"] for batch in batches]),
    np.stack([batch.query["goal"] for batch in batches]),
  )


def test_condition_and_query_are_of_the_same_record_in_every_slice(feed):
  lengths, of_length, of_goal = examples(feed, 0)
  assert sorted(lengths.ravel()) == [1, 2, 3, 4, 5, 6]  # each record once
  np.testing.assert_array_equal(of_length, lengths)
  np.testing.assert_array_equal(of_goal, np.stack([10 * (lengths - 1)] * 2, axis=-1))


def test_the_records_are_those_of_the_step(feed):
  for step in (0, 1):
    expected = feed.records.draw_for_step(SEED, step, 6) + 1
    np.testing.assert_array_equal(examples(feed, step)[0].ravel(), expected)
  assert (examples(feed, 0)[0] != examples(feed, 1)[0]).any()


def test_the_log_is_of_the_rewards_that_the_loss_found(feed):
  record = feed.summarize([{"reward/mean": np.array([1.0, 3.0]), "loss/total": np.array([-1.0])}])
  assert record == {"reward/mean": 2.0, "reward/std": 1.0, "loss/total": -1.0}


def test_shapes_are_those_of_a_draw(feed):
  shapes, selection = feed.shapes(None)
  drawn = feed.draw(None, 0)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes.query) == jax.tree.map(
    lambda x: (x.shape, x.dtype), drawn.data.query
  )
  assert shapes.cond.cond["text"].shape == drawn.data.cond.cond["text"].shape == (3, 2, 1)
  np.testing.assert_array_equal(selection, drawn.selections[0])


def test_a_reward_of_the_host_alone_is_refused():
  host = combine.WeightedRewards((contract.Reward("host", len, None),), (1.0,), "none")
  for given in (None, host):
    with pytest.raises(ValueError, match="expected rewards that run on the device, found none"):
      records.RecordBatches(setup_of({"seed": 0}, given))
