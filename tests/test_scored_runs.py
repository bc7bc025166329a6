"""Whole runs of a model of three numbers: parameters of rewards once, retries, abstention."""

import json

import jax
import numpy as np
import pytest
import toy_model
from device_jobs import records

from jaxalign import train
from jaxalign.rewards import DeviceReward, RewardError
from jaxalign.training import checkpoint

COUNT = 1237  # of numbers that no other array of a run has


def weighing() -> DeviceReward:
  """The brightness, by a reward with a parameter that is found again."""
  return DeviceReward(
    "weighing",
    {"w": np.full(COUNT, 1.0 / COUNT, np.float32)},
    lambda records: np.zeros(len(records), np.float32),
    lambda params, images, query: images.mean((1, 2, 3)) * params["w"].sum() + query,
  )


def counting(images, records):
  """The arrays of that size that devices hold."""
  held = [array for array in jax.live_arrays() if array.shape == (COUNT,)]
  return np.full(len(images), float(len(held)))


def no_verdict(images, records):
  """None on the first sample of a microbatch, and once asked twice of it, as of a busy server."""
  no_verdict.calls += 1
  if no_verdict.calls == 1:
    raise ConnectionError("busy")
  return np.ma.masked_array(images.mean((1, 2, 3)), np.arange(len(images)) == 0)


def silent(images, records):
  return np.ma.masked_all(len(images))


@pytest.fixture
def config(load_config):
  made = load_config("ddpo", "quicktest")
  made.model.path, made.lora.targets = toy_model.PATH, ""
  made.batch.update({"num_records": 4, "group_size": 4, "microbatch": 8})
  made.exactness.update({"max_log_prob_gap": 1.0, "tolerance": 1.0})
  made.evaluation.update({"num_samples": 6, "microbatch": 4, "every": 1})
  return made


def named(config, *rewards):
  names = tuple(f"{__name__}:{reward}" for reward in rewards)
  config.reward = {"names": names, "weights": (1.0,) * len(names), "kwargs": ({},) * len(names)}
  config.reward.normalize = "none"
  config.evaluation.rewards = names
  return config


def test_parameters_are_on_the_device_once_for_the_run_and_its_evaluations(config, tmp_path):
  train.train(named(config, "weighing", "counting"), tmp_path)
  (name,) = (name for name in config.reward.names if "counting" in name)
  for record in records(tmp_path):
    assert record[f"reward/{name}"] == record[f"eval/{name}"] == 1.0
  report = json.loads((tmp_path / "evaluation.json").read_text())["rewards"][name]
  assert report["base"] == report["aligned"] == 1.0


def test_a_run_goes_on_without_some_verdicts_if_it_may(config, tmp_path):
  named(config, "no_verdict")
  name = config.reward.names[0]
  no_verdict.calls = 0
  with pytest.raises(RewardError, match="ConnectionError: busy"):
    train.train(config, tmp_path / "fails")
  no_verdict.calls = 0
  config.reward_pool.update({"num_retries": 1, "retry_seconds": 0.0})
  with pytest.raises(RewardError, match=r"iteration 0: reward: no verdict of .* on 2 of 16 sample"):
    train.train(config, tmp_path / "stops")
  config.reward_pool.max_abstained = 0.2
  train.train(config, tmp_path / "run")
  for record in records(tmp_path / "run"):
    assert record["reward/abstained"] == 2 / 16 and record["grad/norm"] > 0
    assert 0 < record["reward/mean"] < 1 and 0 < record[f"eval/{name}"] < 1
  row = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rewards"][name]
  assert row["abstained"] == {"base": 2, "aligned": 2}  # the first of four, and of two


def test_a_run_without_any_verdict_says_so_and_learns_nothing(config, tmp_path):
  named(config, "silent")
  config.reward_pool.max_abstained = 1.0
  config.guard.update({"action": "warn", "gold": config.reward.names[0], "patience": 1})
  train.train(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    assert line["reward/mean"] is line["reward/std"] is line[f"eval/{config.guard.gold}"] is None
    assert line["reward/abstained"] == 1.0 and line["grad/norm"] == 0.0
  row = json.loads((tmp_path / "evaluation.json").read_text())["rewards"][config.guard.gold]
  assert row["base"] is row["aligned"] is row["difference"] is None


def once(images, records):
  """Verdicts in the first iteration alone."""
  once.calls += 1
  return np.ma.masked_array(images.mean((1, 2, 3)), np.full(len(images), once.calls > 2))


def test_an_error_of_a_reward_loses_no_checkpoint_that_is_being_written(config, tmp_path):
  named(config, "once").evaluation.update({"every": 0, "rewards": ("jpeg_compressibility",)})
  config.guard.action = "off"
  once.calls = 0
  with pytest.raises(RewardError, match=r"iteration 1: reward: no verdict of .* on 16 of 16"):
    train.train(config, tmp_path)
  assert checkpoint.read_latest(tmp_path)[0] == 1


def down_in_the_third(images, records):
  """A server that is down in the third iteration, and only once."""
  down_in_the_third.calls += 1
  if down_in_the_third.calls == 5:  # two microbatches an iteration
    raise ConnectionError("connection refused")
  return images.mean((1, 2, 3))


def test_a_run_whose_reward_fails_goes_on_from_the_iteration_before(config, tmp_path, capsys):
  named(config, "down_in_the_third").num_iterations = 4
  config.evaluation.update({"every": 0, "rewards": ("jpeg_compressibility",)})
  config.guard.action = "off"
  config.checkpoint.every = 100
  down_in_the_third.calls = 0
  with pytest.raises(RewardError, match=r"iteration 2: .*ConnectionError: connection refused"):
    train.train(config, tmp_path / "run")
  assert "iteration 2 is saved, and the same command goes on after it" in capsys.readouterr().err
  train.train(config, tmp_path / "run")
  down_in_the_third.calls = 100
  train.train(config, tmp_path / "whole")
  ends = [checkpoint.read_latest(tmp_path / name)[1]["params"] for name in ("run", "whole")]
  jax.tree.map(np.testing.assert_array_equal, *ends)
