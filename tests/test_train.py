"""The main job, end to end in its `quicktest` size: on the planner, and once on the `shapes` model.

A run takes seconds even when its programs come from the cache, so one of them serves many tests.
"""

import dataclasses
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
import shipped
from device_jobs import on_planner, records

from jaxalign import train
from jaxalign.training import checkpoint, metrics
from jaxalign.training import workdir as workdir_lib
from jaxalign.training.feeds import exactness, online


@pytest.fixture(scope="module")
def make_config(load_config):
  """A config in which every part of the state counts: average, statistics, several epochs."""

  def make(**changes):
    config = on_planner(load_config("ddpo", "quicktest,per_prompt"))
    config.num_iterations = 4
    config.lora.update({"rank": 4, "targets": "."})
    config.ema_decay = 0.9
    config.advantage.min_count = 2
    config.batch.update({"num_epochs": 2, "updates_per_epoch": 2, "timestep_fraction": 0.5})
    config.guidance.scale = 3.0
    config.reward.update({"names": (f"{__name__}:width",), "normalize": "batch"})
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return config

  return make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
  """The workdir of a finished run of four iterations with an adapter and guidance."""
  workdir = tmp_path_factory.mktemp("finished")
  train.train(make_config(), workdir)
  return workdir


def contents(workdir):
  return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_a_run_leaves_everything_it_promises(finished):
  found = {path.name for path in finished.iterdir()}
  assert {"config.json", "metrics.jsonl", "events", "samples", "checkpoints"} <= found
  assert {"evaluation.json", "before_after.png", "reward_curve.png"} <= found
  assert sorted(path.name for path in (finished / "samples").iterdir()) == [
    f"step_{step:06d}.png" for step in range(5)
  ]
  report = json.loads((finished / "evaluation.json").read_text())
  assert set(report["rewards"]) == {"planner"}
  assert [record["step"] for record in records(finished)] == [0, 1, 2, 3]
  assert workdir_lib.load(finished).step == 4


def test_the_log_shows_the_raw_reward_whatever_the_advantages_see(finished):
  for record in records(finished):
    raw = record[f"reward/{__name__}:width"]  # a mean in float32
    assert record["reward/mean"] == pytest.approx(raw, rel=1e-6) and raw > 0.1


def assert_first_ratio_is_one(workdir, gap):
  for record in records(workdir):
    assert record["policy/first_ratio_max_error"] == 0.0
    assert record["policy/log_prob_gap"] <= gap
    assert record["policy/approx_kl"] > 0.0  # of the later updates
    assert record["grad/norm"] > 0.0


def test_the_first_ratio_is_exactly_one_with_an_adapter(finished):
  """Traps 8 and 13: rollout and update evaluate the same policy, guidance included."""
  assert json.loads((finished / "config.json").read_text())["guidance"]["scale"] != 1.0
  assert_first_ratio_is_one(finished, gap=5e-6)


@shipped.programs("sample_fn", "update")
@pytest.mark.parametrize("targets", [pytest.param("", marks=pytest.mark.slow), r"attn2/to_k$"])
def test_on_the_embedded_model_rollout_and_update_agree_to_the_bit(load_config, tmp_path, targets):
  """All of the network's weights are trained, or those of a few layers."""
  config = load_config("ddpo", "quicktest")
  config.lora.targets = targets
  config.guidance.scale = 3.0
  config.batch.update({"num_epochs": 2, "updates_per_epoch": 2, "timestep_fraction": 0.5})
  config.reward.names = (f"{__name__}:width",)
  train.train(config, tmp_path)
  assert_first_ratio_is_one(tmp_path, gap=0.0)
  report = json.loads((tmp_path / "evaluation.json").read_text())
  assert set(report["rewards"]) == {"shapes", "shapes_correct", "shapes_learned"}


def test_nothing_is_compiled_after_the_second_iteration(finished):
  counts = [record["compile/count"] for record in metrics.read(finished)]
  assert counts[1] == counts[-1]


def test_two_iterations_and_two_more_equal_four(finished, make_config, tmp_path):
  """So the same seed gives the same numbers; test_sigterm has another one."""
  train.train(make_config(num_iterations=2), tmp_path)
  train.train(make_config(), tmp_path)
  whole, parts = checkpoint.read_latest(finished), checkpoint.read_latest(tmp_path)
  assert whole[0] == parts[0] == 4
  jax.tree.map(np.testing.assert_array_equal, whole[1], parts[1])
  assert records(tmp_path) == records(finished)


def test_sigterm_saves_and_the_same_command_finishes(finished, make_config, tmp_path, capsys):
  """And another seed gives other numbers."""
  changes = {"seed": 1, "num_iterations": 2, "checkpoint__every": 100}
  config = make_config(**changes, reward__names=(f"{__name__}:terminates_once",))
  terminates_once.done = False
  train.train(config, tmp_path)
  assert "stopped after iteration 1" in capsys.readouterr().out
  assert workdir_lib.load(tmp_path).step == 1
  train.train(config, tmp_path)
  assert workdir_lib.load(tmp_path).step == 2
  written = records(tmp_path)
  assert [record["step"] for record in written] == [0, 1]
  assert written[0]["reward/mean"] != records(finished)[0]["reward/mean"]


def test_a_nan_reward_stops_the_run_and_saves_the_sample(make_config, tmp_path):
  config = make_config(reward__names=(f"{__name__}:not_a_number",))
  with pytest.raises(ValueError, match=r"iteration 0: (.|\n)*rejected_step_0") as error:
    train.train(config, tmp_path)
  assert (tmp_path / "rejected_step_000000" / "0000.npy").exists()
  assert len(str(error.value).splitlines()) <= 3


def test_a_workdir_of_another_config_is_refused_and_left_alone(finished, make_config):
  before = contents(finished)
  with pytest.raises(ValueError, match=r"belongs to another config: config\.guidance"):
    train.train(make_config(guidance__scale=2.0), finished)
  assert contents(finished) == before


def test_the_gap_of_rollout_and_update_is_bounded_in_size_and_in_share():
  bounds = exactness.make(max_log_prob_gap=1e-4, tolerance=1e-6, max_share=0.25)
  gaps = np.array([[0.0, 1e-4], [0.0, 1e-6]])  # one of four above the tolerance
  record = bounds.metrics(gaps)
  assert record == {"policy/log_prob_gap": 1e-4, "policy/log_prob_gap_share": 0.25}
  assert bounds.problem(record, 3, 4) is None
  larger = bounds.problem(bounds.metrics(1.5 * gaps), 3, 4)
  assert larger.startswith("iteration 3: rollout and update disagree about 2 of 4")
  assert "by up to 1.5e-04" in larger and len(larger.splitlines()) == 3
  assert bounds.problem(bounds.metrics(gaps + 2e-6), 3, 4).startswith("iteration 3: rollout and")


@pytest.mark.parametrize("changes, message", [
  ({"tolerance": -1.0}, "config.exactness.tolerance: expected at least 0, got -1.0"),
  ({"max_log_prob_gap": float("nan")}, "exactness.max_log_prob_gap: expected at least 0, got nan"),
  ({"max_share": 1.5}, "config.exactness.max_share: expected 0 to 1, got 1.5"),
])
def test_bounds_that_mean_nothing_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    exactness.make(**{"max_log_prob_gap": 1e-5, "tolerance": 0.0, "max_share": 0.0, **changes})


def test_a_gap_beyond_the_bound_ends_the_run_after_saving_it(make_config, tmp_path, monkeypatch):
  """With a rollout whose log-probabilities are off; then it continues, to the same bits."""
  original = online.collect

  def off(parts):
    rollout, cond = original(parts)
    return dataclasses.replace(rollout, log_prob=rollout.log_prob + 3e-5), cond

  monkeypatch.setattr(online, "collect", off)
  with pytest.raises(ValueError, match=r"iteration 0: .* disagree about (\d+) of \1 .*") as error:
    train.train(make_config(num_iterations=2), tmp_path / "stopped")
  assert "this iteration is saved; the same command continues after it" in str(error.value)
  assert checkpoint.read_latest(tmp_path / "stopped")[0] == 1
  accepted = {"num_iterations": 2, "exactness__max_log_prob_gap": 1e-4}
  accepted["exactness__max_share"] = 1.0
  train.train(make_config(**accepted), tmp_path / "stopped")
  train.train(make_config(**accepted), tmp_path / "whole")
  states = [checkpoint.read_latest(tmp_path / name)[1] for name in ("stopped", "whole")]
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("change,message", [
  ({"batch__microbatch": 3}, r"config\.batch: 4 samples .* microbatch can be one of \[1, 2\]"),
  ({"method__name": "dppo"}, r"unknown method 'dppo'; did you mean .*(.|\n)*ddpo"),
  ({"reward__names": ("shape",)}, r'unknown reward "shape".*did you mean "shapes"'),
  ({"reward__names": ("no_such_module:f",)}, r"could not import module"),
  ({"advantage__name": "grp"}, "unknown estimator"),
  ({"advantage__name": "group"}, r"config\.advantage 'group': .*valid keys"),
  ({"data__source": "missing.txt"}, "found no such file"),
  ({"model__path": "./missing"}, "no model folder"),
  ({"process__transition": "ddpm"}, r"config\.process|ddpm"),
  ({"lora__targets": "nothing"}, "match none"),
  ({"lora__targets": "("}, "no regular expression"),
  ({"process__noise_level": 0.0}, "every step is deterministic"),
  ({"seed": 2**31}, r"config\.seed: expected a seed from 0"),
  ({"num_iterations": 0}, "num_iterations: expected at least 1"),
  ({"ema_decay": 1.0}, "ema_decay: expected 0"),
  ({"evaluation__num_samples": 0}, "num_samples: expected at least 1"),
])
def test_a_wrong_config_is_refused_before_anything_is_written(
  make_config, tmp_path, change, message
):
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match=message) as error:
    train.train(make_config(**change), workdir)
  assert not workdir.exists()
  assert len(str(error.value).splitlines()) <= 3


def test_one_image_a_prompt_is_refused_where_groups_are_compared(load_config, tmp_path):
  config = load_config("ddpo", "quicktest")
  config.batch.update({"num_records": 4, "group_size": 1})
  with pytest.raises(ValueError, match="compares the samples of one record"):
    train.train(config, tmp_path / "run")


def test_plain_reinforce_is_refused_for_several_updates(load_config, tmp_path):
  config = load_config("ddpo", "quicktest,score_function")
  config.batch.num_epochs = 2
  with pytest.raises(ValueError, match="no ratio to correct a second update"):
    train.train(config, tmp_path / "run")


@pytest.mark.slow  # tests/test_every_method.py has Diffusion-DPO's
def test_a_dry_run_states_memory_and_speed_and_writes_nothing(make_config, tmp_path, capsys):
  train.train(make_config(), tmp_path / "run", dry_run=True)
  printed = capsys.readouterr().out
  assert "4 plans = 2 records x 2" in printed
  assert "memory per device" in printed and "plans/s" in printed
  assert list(pathlib.Path(tmp_path).iterdir()) == []


def width(samples, records):
  """How far a sample's numbers are spread; of plans and of images."""
  del records
  return samples.reshape(len(samples), -1).std(axis=1)


def terminates_once(samples, records):
  if not terminates_once.done:
    terminates_once.done = True
    os.kill(os.getpid(), signal.SIGTERM)
  return width(samples, records)


def not_a_number(samples, records):
  return np.where(np.arange(len(samples)) == 1, np.nan, width(samples, records))
