"""What an evaluation computes and what it leaves alone, on a system of a few numbers."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import steering, streams, system
from jaxalign.distributed import sharding
from jaxalign.evaluation import evaluation
from jaxalign.modalities.image import IMAGES

NUM_IMAGES, MICROBATCH = 6, 4


class Stub:
  """A `System` whose images are grey as its parameters say, and that counts its KLs."""

  def __init__(self):
    self.noise, self.kls = [], []
    self.system = object.__new__(system.System)
    model = types.SimpleNamespace(
      tokenize=lambda records: np.zeros((len(records), 3), np.int32),
      describe=lambda record: record["prompt"],
      modality=IMAGES,
    )
    policy = types.SimpleNamespace(params=0.25)
    table = types.SimpleNamespace(num_steps=2)
    process = types.SimpleNamespace(table=table, noisy_steps=lambda: [0, 1])
    pipeline = types.SimpleNamespace(process=process, table=table)
    fields = {"model": model, "policy": policy, "frozen": {}, "pipeline": pipeline}
    fields["mesh"] = sharding.one_device()
    fields |= {"sampler": steering.Sampler(None, 0.0, True, "chain"), "rewards": None}
    for name, value in {**fields, "sample_fn": self.sample, "kl_fn": self.kl}.items():
      object.__setattr__(self.system, name, value)

  def sample(self, params, frozen, token_ids, seed, name, i, j, start, table):
    self.noise.append((seed, name, i, j))
    images = jnp.full((len(token_ids), 8, 8, 3), params).at[:, :4].add(0.1)
    return types.SimpleNamespace(samples=images)

  def kl(self, params, frozen, sampled, table):
    self.kls.append(params)
    return np.full(len(sampled.samples), 3.0, np.float32)


@pytest.fixture
def stub():
  return Stub()


def make(**changes):
  return evaluation.make_evaluation(**{
    "source": "shapes/held_out",
    "num_samples": NUM_IMAGES,
    "rewards": [f"{__name__}:brightness"],
    "seed": 5,
    "microbatch": MICROBATCH,
    "features": "pixels",
    **changes,
  })


def test_no_kl_is_computed_unless_it_is_asked_for(stub):
  made = make()
  scores = made.run(stub.system, 0.5)
  assert not stub.kls and scores.kl is None
  assert scores.means("")["kl_to_ref"] is None and "vendi" in scores.means("")
  comparison = made.compare_with_base(stub.system, 0.5)
  assert not stub.kls
  assert comparison.report()["kl_to_ref"] is None and "KL" not in comparison.table()


def test_it_is_computed_of_the_trained_parameters_alone(stub):
  made = make(kl=True)
  comparison = made.compare_with_base(stub.system, 0.5)
  assert stub.kls == [0.5, 0.5]  # once a microbatch, and never of the base model
  assert comparison.report()["kl_to_ref"] == 3.0 and "3.000 nats" in comparison.table()
  scores = made.run(stub.system, 0.5, kl=made.kl)
  assert scores.kl.shape == (NUM_IMAGES,) and scores.means("eval/")["eval/kl_to_ref"] == 3.0


def test_pictures_cost_no_kl(stub):
  records, images, kl = make(kl=True).sample(stub.system, 0.5, num_samples=3)
  assert len(records) == len(images) == 3 and kl is None and not stub.kls


def test_both_sides_get_the_noise_of_evaluations_and_no_other(stub):
  make().compare_with_base(stub.system, 0.5)
  name = streams.number("evaluation")
  assert stub.noise == 2 * [(5, name, 0, 0), (5, name, 0, 1)]


def test_every_sample_is_scored_with_its_own_record_in_whatever_pieces(stub):
  made = make(rewards=[f"{__name__}:length"])  # pieces of four, and of two
  expected = [len(record["prompt"]) for record in made.records[made.ids]]
  assert expected[:2] != expected[4:]
  found = made.run(stub.system, 0.5).rewards[f"{__name__}:length"]
  np.testing.assert_array_equal(found, expected)


def test_a_report_says_what_is_of_the_base_model_and_what_of_the_aligned_one(stub):
  """Half of each image is 0.1 brighter than the parameters; a category adds its own number."""
  made = make(rewards=[f"{__name__}:brightness_and_category"])
  report = made.compare_with_base(stub.system, 0.5).report()
  row = report["rewards"][f"{__name__}:brightness_and_category"]
  categories = [record["category"] for record in made.records[made.ids]]
  offset = np.mean([len(category) for category in categories])
  assert row["base"] == pytest.approx(0.3 + offset, abs=1e-5)
  assert row["aligned"] == pytest.approx(0.55 + offset, abs=1e-5)
  assert row["difference"] == pytest.approx(0.25, abs=1e-5) and row["win_rate"] == 1.0
  assert set(row["categories"]) == set(categories) and len(set(categories)) > 1
  for category, means in row["categories"].items():
    expected = {"base": 0.3 + len(category), "aligned": 0.55 + len(category)}
    assert means == pytest.approx(expected, abs=1e-5)


def length(images, records):
  return np.array([len(record["prompt"]) for record in records], np.float32)


def brightness_and_category(images, records):
  added = np.array([len(record["category"]) for record in records], np.float32)
  return images.mean((1, 2, 3)) + added


def brightness(images, prompts):
  del prompts
  return images.mean((1, 2, 3))
