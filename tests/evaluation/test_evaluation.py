"""What an evaluation computes and what it leaves alone, on a system of a few numbers."""

import contextlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import steering, streams, system
from jaxalign.distributed import sharding
from jaxalign.evaluation import evaluation
from jaxalign.modalities.image import IMAGES
from jaxalign.rewards import DeviceReward, combine, retry, scoring

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


def on_mesh(*, scale=2.0) -> DeviceReward:
  """`scale` times the length of the prompt, plus the brightness of a corner."""
  encoded = []

  def encode(records):
    encoded.append(len(records))
    assert encoded == [NUM_IMAGES]  # once, of all of them
    return np.array([len(record["prompt"]) for record in records], np.float32)

  def score(params, images, query):
    return params["scale"] * query + images[:, 0, 0, 0]

  return DeviceReward("on_mesh", {"scale": np.full(3, scale, np.float32)[0]}, encode, score)


def test_rewards_on_the_mesh_are_asked_of_their_own_records_once(stub):
  """Of the last microbatch two samples are padding, which nobody scores."""
  name = f"{__name__}:on_mesh"
  made = make(rewards=[f"{__name__}:brightness", name])
  lengths = np.array([len(record["prompt"]) for record in made.records[made.ids]])
  for params in (0.5, 0.25):
    rewards = made.run(stub.system, params).rewards
    assert list(rewards) == [f"{__name__}:brightness", name]
    np.testing.assert_allclose(rewards[name], 2 * lengths + params + 0.1, rtol=1e-6)


def picky(images, records):
  """The brightness; no verdict on the first two of four, nor on one that is bright."""
  without = np.arange(len(images)) < 2
  return np.ma.masked_array(images.mean((1, 2, 3)), without | (images[:, 0, 0, 0] > 0.9))


def test_means_are_over_verdicts_and_the_report_counts_the_others(stub):
  name = f"{__name__}:picky"
  made = make(rewards=[name])  # pieces of four and two, of which two and none have a verdict
  scores = made.run(stub.system, 0.5)
  np.testing.assert_array_equal(np.isnan(scores.rewards[name]), [1, 1, 0, 0, 1, 1])
  assert scores.means("")[name] == pytest.approx(0.55) and scores.abstained == {name: 4}
  comparison = made.compare_with_base(stub.system, 0.5)
  row = comparison.report()["rewards"][name]
  assert row["abstained"] == {"base": 4, "aligned": 4}
  assert row["base"] == pytest.approx(0.3) and row["aligned"] == pytest.approx(0.55)
  assert row["difference"] == pytest.approx(0.25) and row["win_rate"] == 1.0
  assert "no verdict on 4 (base) and 4 (aligned) of 6" in comparison.table()


def test_without_a_verdict_a_figure_is_not_defined(stub):
  name = f"{__name__}:picky"
  comparison = make(rewards=[name]).compare_with_base(stub.system, 0.9)
  row = comparison.report()["rewards"][name]
  assert row["base"] == pytest.approx(0.3) and row["aligned"] is None
  assert row["difference"] is row["interval_95"] is row["win_rate"] is None
  assert row["abstained"] == {"base": 4, "aligned": 6}
  assert comparison.aligned.means("eval/")[f"eval/{name}"] is None
  assert "none: no sample has both verdicts" in comparison.table()


def flaky(images, records):
  flaky.calls += 1
  if flaky.calls == 1:
    raise ConnectionError("server is gone")
  return images.mean((1, 2, 3))


def test_an_evaluation_asks_again_as_the_run_does(stub):
  section = {"source": "shapes/held_out", "num_samples": 4, "seed": 5, "microbatch": 4}
  section |= {"rewards": [f"{__name__}:flaky"], "features": "pixels"}
  for retries, found in ((0, pytest.raises(ValueError, match="server is gone")),
                         (1, contextlib.nullcontext())):  # fmt: skip
    flaky.calls = 0
    asked_again = retry.of_section({"num_threads": 1, "num_retries": retries, "retry_seconds": 0})
    with found:
      evaluation.make_evaluations(**section, retry=asked_again).test.run(stub.system, 0.5)


def test_both_parts_and_the_run_have_the_parameters_of_a_reward_once(stub):
  name = f"{__name__}:on_mesh"
  run = scoring.placed(combine.make_total([name], kwargs=[{"scale": 3.0}]), stub.system.mesh)
  section = {"source": "shapes/test", "validation": "shapes/validation", "num_samples": 6}
  section |= {"rewards": [name], "seed": 5, "microbatch": 4, "features": "pixels"}
  for kwargs, same in ([{"scale": 3.0}], True), ([{"scale": 2.0}], False):
    parts = evaluation.make_evaluations(**section, kwargs=kwargs, known=run.rewards)
    found = [part.judge.placed(stub.system.mesh).params[name] for part in parts]
    assert found[0]["scale"] is found[1]["scale"]
    assert (found[0]["scale"] is run.params[name]["scale"]) == same


def length(images, records):
  return np.array([len(record["prompt"]) for record in records], np.float32)


def brightness_and_category(images, records):
  added = np.array([len(record["category"]) for record in records], np.float32)
  return images.mean((1, 2, 3)) + added


def brightness(images, prompts):
  del prompts
  return images.mean((1, 2, 3))
