"""The main job, end to end on the embedded model, in its `quicktest` size."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from jaxalign import checkpoint, run, train
from jaxalign.metrics import NonFiniteError

TIMING = {"throughput/images_per_s", "compile/count"}


@pytest.fixture
def config(load_config):
  return load_config("ddpo", "quicktest")


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {name: value for name, value in json.loads(line).items() if name not in TIMING}
    for line in lines
  ]


def test_a_run_leaves_everything_it_promises(config, tmp_path, capsys):
  train.train(config, tmp_path)
  found = {path.name for path in tmp_path.iterdir()}
  expected = {"config.json", "metrics.jsonl", "events", "samples", "checkpoints"}
  assert expected | {"evaluation.json", "before_after.png"} <= found
  assert {path.name for path in (tmp_path / "samples").iterdir()} == {
    f"step_{step:06d}.png" for step in range(3)
  }
  report = json.loads((tmp_path / "evaluation.json").read_text())
  assert set(report["rewards"]) == {"shapes", "shapes_correct"}
  printed = capsys.readouterr().out
  assert "4 images = 2 prompts x 2" in printed and "95 % interval" in printed
  assert run.load(tmp_path).step == 2


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_first_ratio_is_exactly_one_and_later_ones_are_not(config, tmp_path, rank):
  """Traps 8 and 13: the update evaluates the same program as the rollout, guidance included."""
  assert config.guidance.scale != 1.0
  config.lora.rank = rank
  config.batch.updates_per_epoch = 2
  config.batch.num_epochs = 2
  config.reward.names = (f"{__name__}:brightness",)
  train.train(config, tmp_path)
  for record in records(tmp_path):
    assert record["policy/first_ratio_max_error"] == 0.0
    assert record["policy/log_prob_gap"] == 0.0
    assert record["policy/approx_kl"] > 0.0
    assert record["grad/norm"] > 0.0


def test_the_same_seed_gives_the_same_metrics_and_another_seed_does_not(config, tmp_path):
  config.reward.names = (f"{__name__}:brightness",)
  train.train(config, tmp_path / "a")
  train.train(config, tmp_path / "b")
  config.seed = 1
  train.train(config, tmp_path / "c")
  assert records(tmp_path / "a") == records(tmp_path / "b")
  assert records(tmp_path / "a") != records(tmp_path / "c")


def test_two_iterations_and_two_more_equal_four(load_config, tmp_path):
  """With an average and running statistics, so that every part of the state counts."""
  config = load_config("ddpo", "per_prompt,quicktest")
  config.advantage.min_count = 2
  config.reward.names = (f"{__name__}:brightness",)
  config.ema_decay = 0.9
  config.num_iterations = 4
  train.train(config, tmp_path / "whole")
  config.num_iterations = 2
  train.train(config, tmp_path / "parts")
  config.num_iterations = 4
  train.train(config, tmp_path / "parts")
  whole, parts = (checkpoint.read_latest(tmp_path / name) for name in ("whole", "parts"))
  assert whole[0] == parts[0] == 4
  jax.tree.map(np.testing.assert_array_equal, whole[1], parts[1])
  assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_sigterm_saves_and_the_same_command_finishes(config, tmp_path, capsys):
  config.num_iterations = 3
  config.checkpoint.every = 100
  config.reward.names = (f"{__name__}:terminates_once",)
  terminates_once.done = False
  train.train(config, tmp_path)
  assert "stopped after iteration 1" in capsys.readouterr().out
  assert run.load(tmp_path).step == 1
  train.train(config, tmp_path)
  assert run.load(tmp_path).step == 3
  assert [record["step"] for record in records(tmp_path)] == [0, 1, 2]


def test_nothing_is_compiled_after_the_second_iteration(config, tmp_path):
  config.num_iterations = 4
  train.train(config, tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  counts = [json.loads(line)["compile/count"] for line in lines]
  assert counts[1] == counts[-1]


def test_a_nan_reward_stops_the_run_and_saves_the_image(config, tmp_path):
  config.reward.names = (f"{__name__}:not_a_number",)
  with pytest.raises(ValueError, match=r"iteration 0: (.|\n)*rejected_step_0") as e:
    train.train(config, tmp_path)
  assert (tmp_path / "rejected_step_000000.png").exists()
  assert len(str(e.value).splitlines()) <= 3


@pytest.mark.parametrize("name,message", [
  ("too_short", r"expected shape \(2,\)"),
  ("text", "expected numbers, got dtype"),
])
def test_a_reward_of_the_wrong_kind_is_refused(config, tmp_path, name, message):
  config.reward.names = (f"{__name__}:{name}",)
  with pytest.raises(ValueError, match=message):
    train.train(config, tmp_path)


def test_a_workdir_of_another_config_is_refused_and_left_alone(config, tmp_path):
  train.train(config, tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  config.guidance.scale = 2.0
  with pytest.raises(ValueError, match=r"belongs to another config: config\.guidance"):
    train.train(config, tmp_path)
  assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_gap_beyond_the_bound_stops_the_run(config, tmp_path):
  config.exactness.max_log_prob_gap = -1.0  # even an exact run fails this
  with pytest.raises(ValueError, match="log-probabilities of rollout and update differ"):
    train.train(config, tmp_path)


def test_a_metric_that_is_not_finite_stops_the_run(config, tmp_path):
  config.optim.learning_rate = float("inf")
  config.reward.names = (f"{__name__}:brightness",)
  with pytest.raises((NonFiniteError, ValueError), match=r"NaN|not finite|finite images"):
    train.train(config, tmp_path)


@pytest.mark.parametrize("change,message", [
  ({"batch.microbatch": 3}, r"config\.batch: 4 images .* microbatch can be one of \[1, 2\]"),
  ({"method.name": "dppo"}, r"unknown method 'dppo'; known: ddpo"),
  ({"reward.names": ("shape",)}, r'unknown reward "shape".*did you mean "shapes"'),
  ({"reward.names": ("no_such_module:f",)}, r"could not import module"),
  ({"advantage.name": "grp"}, "unknown estimator"),
  ({"data.source": "missing.txt"}, "found no file"),
  ({"model.path": "./missing"}, "no model folder"),
  ({"process.transition": "flow_sde"}, "config.process|flow_sde"),
  ({"lora.targets": "nothing"}, "match none"),
])
def test_a_wrong_config_is_refused_before_anything_is_written(config, tmp_path, change, message):
  config.update_from_flattened_dict(change)
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match=message) as error:
    train.train(config, workdir)
  assert not workdir.exists()
  assert len(str(error.value).splitlines()) <= 3


def test_a_dry_run_states_memory_and_speed_and_writes_nothing(config, tmp_path, capsys):
  train.train(config, tmp_path / "run", dry_run=True)
  printed = capsys.readouterr().out
  assert "memory per device" in printed and "images/s" in printed
  assert not (tmp_path / "run").exists()


def brightness(images, prompts):
  del prompts
  return images.mean((1, 2, 3))


def terminates_once(images, prompts):
  if not terminates_once.done:
    terminates_once.done = True
    os.kill(os.getpid(), signal.SIGTERM)
  return brightness(images, prompts)


def not_a_number(images, prompts):
  return np.where(np.arange(len(images)) == 1, np.nan, brightness(images, prompts))


def too_short(images, prompts):
  return brightness(images, prompts)[:1]


def text(images, prompts):
  return [record["prompt"] for record in prompts]
