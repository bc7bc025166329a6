"""Rewards that are told the time of a noise level, by a method and a reward from outside."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from device_jobs import records

from jaxalign import methods, rewards, train
from jaxalign.diffusion import forward, schedules
from jaxalign.rewards import DeviceReward, combine

RECORDS = [{"prompt": "x"}, {"prompt": "xyz"}]
X, T = np.float32([[1.0], [2.0]]), np.float32([10.0, 500.0])


def of_time(*, slope=1.0) -> DeviceReward:
  """The length of the prompt, less `slope` t / 1000: a finished sample has the time 0."""

  def score(params, samples, query, t=None):
    t = jnp.zeros(len(samples)) if t is None else t
    mean = samples.reshape(len(samples), -1).mean(axis=1)
    return query - params["slope"] * t / 1000 + 0.0 * mean

  return DeviceReward("of_time", {"slope": np.float32(slope)}, lengths, score)


def lengths(records):
  return np.array([len(record["prompt"]) for record in records], np.float32)


def timeless() -> DeviceReward:
  def score(params, samples, query):
    return samples.sum(1) * query

  return DeviceReward("timeless", {}, lengths, score)


def careless() -> DeviceReward:
  return DeviceReward("careless", {}, lengths, lambda params, samples, query, t: query)


def total_of(*names, weights=None):
  return combine.make_total([f"{__name__}:{name}" for name in names], weights=weights)


def value(total, *t):
  query = total.device.encode(RECORDS)
  return total.device.value(total.device.params, X, query, *t)


def test_a_time_reaches_the_reward_and_every_part_of_a_sum():
  np.testing.assert_allclose(value(total_of("of_time"), T), [0.99, 2.5], rtol=1e-6)
  np.testing.assert_allclose(value(total_of("of_time")), [1, 3])
  kwargs = ({"slope": 0.0}, {})
  names = [f"{__name__}:of_time", f"{__name__}:also_of_time"]
  both = combine.make_total(names, weights=(1.0, -2.0), kwargs=kwargs)
  np.testing.assert_allclose(value(both, T), [1 - 2 * 0.99, 3 - 2 * 2.5], rtol=1e-6)


def also_of_time() -> DeviceReward:
  return of_time()


def test_a_time_is_refused_where_none_is_taken():
  np.testing.assert_allclose(value(total_of("timeless")), [1, 6])
  message = rf'"{__name__}:timeless": expected no time, because its score has no argument t'
  with pytest.raises(ValueError, match=message):
    value(total_of("timeless"), T)
  with pytest.raises(ValueError, match=message):  # though another part of the sum takes it
    value(total_of("of_time", "timeless"), T)
  assert not rewards.make_device("planner").takes_time


def test_finished_samples_come_without_one():
  with pytest.raises(ValueError, match=r'careless": expected score.*t=None.*found t without that'):
    rewards.make_device(f"{__name__}:careless")


def make_judged_on_the_way(pipeline) -> methods.Method:
  """The reward of noised samples, which the toy reward knows by their time alone."""

  def loss(variables, frozen, batch, key):
    (query,) = batch.query.values()
    count = len(query)
    key_x, key_t = jax.random.split(key)
    x_0 = jax.random.normal(key_x, (count, *pipeline.latent_shape))
    row, eps = forward.draw(key_t, pipeline.levels, count, pipeline.latent_shape)
    x_t = schedules.add_noise(x_0, eps, row.alpha_t, row.sigma_t)
    reward = pipeline.reward(frozen, x_t, batch.query, row.t)
    bias = variables["params"]["layer"]["bias"].sum()  # so that there is a gradient
    return bias - reward, {"seen/t": row.t, "seen/reward": reward, "seen/query": query}

  return methods.Method(loss, methods.Records())


@pytest.fixture
def make_config(load_config):
  def make(reward):
    config = load_config("draft", "quicktest")
    config.model.path, config.lora.targets = toy_model.PATH, ""
    config.num_iterations = 2
    config.batch.update({"num_examples": 4, "microbatch": 2})
    config.reward.names = config.evaluation.rewards = (f"{__name__}:{reward}",)
    config.guard.action = "off"
    config.method = {"name": f"{__name__}:make_judged_on_the_way"}
    config.self_check.action = "off"
    return config

  return make


def test_a_method_from_outside_judges_noised_samples(make_config, tmp_path):
  train.train(make_config("of_time"), tmp_path)
  found = records(tmp_path)
  for record in found:
    assert record["seen/t"] > 0  # as the network is given it
    expected = record["seen/query"] - record["seen/t"] / 1000
    assert record["seen/reward"] == pytest.approx(expected, abs=1e-5)
  assert found[0]["seen/t"] != found[1]["seen/t"]
  name = f"{__name__}:of_time"
  assert json.loads((tmp_path / "evaluation.json").read_text())["rewards"][name]["base"] > 0


def test_a_method_that_gives_a_time_to_a_reward_without_one_ends_with_a_sentence(
  make_config, tmp_path
):
  with pytest.raises(ValueError, match=r'length": expected no time, because its score has no'):
    train.train(make_config("length"), tmp_path)


def length() -> DeviceReward:
  def score(params, samples, query):
    return samples.reshape(len(samples), -1).mean(1) + query

  return DeviceReward("length", {}, lengths, score)
