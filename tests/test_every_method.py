"""Every config and variant that aligns, end to end in `quicktest` size.

Stored pairs are of images, for a tiny random Stable Diffusion; all else is run on the planner.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_jobs import on_planner, records, without_the_last_iteration

from jaxalign import evaluate, export, train
from jaxalign.cli import command
from jaxalign.rewards import DeviceReward
from jaxalign.training import checkpoint, guard, metrics
from jaxalign.training import workdir as workdir_lib

NO_NOISE = {"process__noise_level": 0.0}
# One of each feed is run, and continued, in the default suite; the others have `-m slow`.
CONTINUED = [("dpo", "lora"), ("d3po", ""), ("draft", "align_prop")]
RUNS = [
  ("dpo", "ipo,full"),
  ("d3po", "lora"),
  ("draft", "lora"),
  ("draft", "whole"),
  ("draft", "lv"),
  ("draft", "refl"),
]


def judged_once(images, prompts):
  """By evaluation: the base model's, then a better one, and then worse and worse ones."""
  score = [0.5, 0.9, 0.3, 0.2][min(judged_once.seen, 3)]
  judged_once.seen += 1
  return np.full(len(images), score)


def brightness(*, target=0.6) -> DeviceReward:
  """How near the mean colour is to `target`: a reward without weights but one number."""
  return DeviceReward(
    "brightness",
    {"target": jnp.float32(target)},
    lambda prompts: np.array([len(prompt["prompt"]) for prompt in prompts], np.float32),
    lambda params, images, features: (
      -jnp.abs(images.mean((1, 2, 3)) - params["target"]) + 0.0 * features
    ),
  )


@pytest.fixture(scope="module")
def make_config(load_config, pairs_file, small_model):
  def make(name, variant, **changes):
    config = load_config(name, ",".join(filter(None, ["quicktest", variant])))
    config.evaluation.kl = True
    if name == "dpo" or "model__path" in changes:
      config.model.path = str(small_model)
      config.evaluation.rewards = (f"{__name__}:brightness",)
      config.guard.gold = f"{__name__}:brightness"
      if "reward" in config:
        config.reward.names = (f"{__name__}:brightness",)
    else:
      on_planner(config)
    if name == "dpo":
      config.data.update({"source": str(pairs_file), "max_bad_fraction": 0.2, "resize": "crop"})
    if config.method.name == "refl":
      config.method.target = 0.5
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in changes.items()})
    return config

  return make


def assert_moved_and_evaluated(name, workdir, on_images=False):
  written = records(workdir)
  assert [record["step"] for record in written] == [0, 1]
  assert all(record["grad/norm"] > 0 for record in written)
  report = json.loads((workdir / "evaluation.json").read_text())
  # DDIM's last step, to the data, has no noise.
  assert report["kl_to_ref"] > 0 and report["kl_steps"] == [3 if on_images else 4, 4]
  assert report["kl_floor"] is None and report["vendi"]["base"] > 1
  counts = [record["compile/count"] for record in metrics.read(workdir)]
  assert counts[0] == counts[1]
  if name == "dpo":
    report = json.loads((workdir / "preferences_report.json").read_text())
    assert report["counts"] == {"missing image": 1}
    assert written[0]["preference/margin"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name,variant", RUNS)
def test_a_run_moves_the_policy_and_evaluates_it(name, variant, make_config, tmp_path):
  train.train(make_config(name, variant), tmp_path)
  assert_moved_and_evaluated(name, tmp_path, on_images=name == "dpo")


def test_a_chain_without_noise_has_no_kl_anywhere_and_pays_for_none(make_config, tmp_path, capsys):
  changes = {**NO_NOISE, "evaluation__every": 1, "guard__action": "warn"}
  config = make_config("draft", "", **changes)
  train.train(config, tmp_path)
  report = json.loads((tmp_path / "evaluation.json").read_text())
  assert report["kl_to_ref"] is None and report["kl_steps"] == [0, 4]
  assert "trajectory KL" in (shown := capsys.readouterr().out) and "not one of 4 steps" in shown
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["eval/kl_to_ref"] for line in lines] == [None, None]
  assert all("eval/kl_to_ref" not in record for record in metrics.read(tmp_path))
  found = workdir_lib.load(tmp_path)
  broken = dataclasses.replace(found.system, kl_fn=None)  # would fail if it were called
  record = {"start": (-0.9, 0.0), "goal": (0.9, 0.0)}
  assert broken.sample_all(found.params, [record], microbatch=2, seed=0, kl=True)[1] is None


@pytest.mark.slow  # tests/test_export.py trains an adapter of an XL by DDPO
@pytest.mark.parametrize("name", ["ddpo", "dpo", "draft"])
def test_xl_is_trained_by_the_same_path(name, make_config, small_xl, tmp_path):
  train.train(make_config(name, "lora", model__path=str(small_xl)), tmp_path)
  assert_moved_and_evaluated(name, tmp_path, on_images=True)


@pytest.mark.parametrize("name,variant", CONTINUED)
def test_one_iteration_and_one_more_equal_two(name, variant, make_config, tmp_path):
  train.train(make_config(name, variant), tmp_path / "whole")
  assert_moved_and_evaluated(name, tmp_path / "whole", on_images=name == "dpo")
  parts = without_the_last_iteration(tmp_path / "whole", tmp_path / "parts")
  train.train(make_config(name, variant), parts)
  whole, parts = (checkpoint.read_latest(tmp_path / part) for part in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, whole[1], parts[1])
  assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_a_guard_ends_a_run_with_the_best_checkpoint_and_says_so_again(
  make_config, tmp_path, capsys
):
  changes = dict(num_iterations=5, evaluation__every=1, guard__action="stop", guard__patience=1)
  changes["guard__kl_budget"] = 1e-9
  train.train(make_config("draft", "whole", **changes), tmp_path)
  printed = capsys.readouterr()
  assert "above the budget of 1e-09" in printed.out + printed.err
  assert "ended by the guard" in printed.out
  assert len(records(tmp_path)) == 1
  before = (tmp_path / "evaluation.json").read_bytes()
  train.train(make_config("draft", "whole", **changes), tmp_path)
  assert "ended by the guard" in capsys.readouterr().out
  assert len(records(tmp_path)) == 1 and (tmp_path / "evaluation.json").read_bytes() == before
  assert json.loads(before)["part"] == "test"


@pytest.fixture(scope="module")
def ended(make_config, tmp_path_factory):
  """The workdir of a run that a guard ended after three iterations, with the state of the first."""
  workdir = tmp_path_factory.mktemp("ended")
  judged_once.seen = 0
  changes = {"num_iterations": 5, "evaluation__every": 1, "ema_decay": 0.5}
  config = make_config("draft", "", guard__action="stop", guard__patience=2, **changes)
  config.evaluation.rewards = (f"{__name__}:judged_once",)
  config.guard.gold = f"{__name__}:judged_once"
  config.samples.every = 0
  config.evaluation.microbatch = config.evaluation.num_samples  # one call for each evaluation
  train.train(config, workdir)
  return workdir


def test_commands_take_the_state_that_a_guard_ended_a_run_with(ended):
  assert guard.kept(ended) == guard.Kept(1, ended=True) and len(records(ended)) == 3
  takes = ("chosen", "newest", "best")
  chosen, newest, best = (workdir_lib.load(ended, take=take) for take in takes)
  assert (chosen.step, newest.step, best.step) == (1, 3, 1)
  assert chosen.taken == "iteration 1, the best by its guard"
  assert newest.taken == "iteration 3, the newest checkpoint"
  saved = checkpoint.read_latest(ended, checkpoint.BEST)[1]["copies"]["ema"]
  same = functools.partial(np.testing.assert_allclose, atol=1e-7)  # a strength of 1 rounds
  jax.tree.map(same, chosen.params, saved)
  with pytest.raises(AssertionError):
    jax.tree.map(same, chosen.params, newest.params)


def test_evaluate_and_export_follow_and_a_flag_takes_the_newest(ended, tmp_path, capsys):
  workdir = shutil.copytree(ended, tmp_path / "run")
  reported = json.loads((workdir / "evaluation.json").read_text())
  for flag, step in (("--nonewest", 1), ("--newest", 3)):
    output = tmp_path / f"out_{step}"
    given = (f"--workdir={workdir}", flag)
    judged_once.seen = 4  # as at the run's own end
    evaluate.main(command.parse(evaluate.define_flags, *given))
    export.main(command.parse(export.define_flags, *given, f"--output={output}"))
    assert capsys.readouterr().out.count(f"run: iteration {step}, the") == 2
    assert json.loads((output / "jaxalign_export.json").read_text())["iteration"] == step
    found = json.loads((workdir / "evaluation.json").read_text())
    same = found["kl_to_ref"] == pytest.approx(reported["kl_to_ref"], rel=1e-3)
    assert same == (step == 1)


def test_a_run_whose_guard_found_nothing_better_than_the_base_model_gives_that(ended, tmp_path):
  workdir = shutil.copytree(ended, tmp_path / "run")
  written = json.loads((workdir / guard.RECORD).read_text())
  (workdir / guard.RECORD).write_text(json.dumps({**written, "best_step": 0}))
  found = workdir_lib.load(workdir)
  assert found.step == 0 and "the base model" in found.taken
  jax.tree.map(np.testing.assert_array_equal, found.params, found.system.policy.params)
  (workdir / guard.RECORD).unlink()
  assert workdir_lib.load(workdir).step == 3
  with pytest.raises(ValueError, match=r"watched, found no .*guard\.json"):
    workdir_lib.load(workdir, take="best")


@pytest.mark.parametrize("name,changes,message", [
  ("dpo", {"data__source": "nowhere.parquet"}, "found no such file"),
  ("dpo", {"data__max_bad_fraction": 0.0}, "missing image"),
  ("dpo", {"data__condition_dropout": 2.0}, "condition_dropout: expected 0 to 1"),
  ("dpo", {"batch__microbatch": 3}, r"4 examples do not split .* microbatch can be one of"),
  ("dpo", {"method__time_weight": "snr"}, "expected one of half, elbo"),
  ("d3po", {"batch__group_size": 1}, "group_size: expected at least 2"),
  ("d3po", {"batch__microbatch": 2, "batch__group_size": 4}, "whole groups"),
  ("draft", {"reward__names": ("planner_success",)}, "run on the device and can be differentiated"),
  ("draft", {"reward__normalize": "batch"}, "normalize 'none'"),
  ("draft", {"method__num_grad_steps": 5}, "expected 1 to 4 steps to differentiate through, or 0"),
  ("draft", {"guard__action": "stop"}, "set config.evaluation.every above 0"),
  (
    "draft",
    {**NO_NOISE, "method__kl_weight": 0.1},
    r"kl_weight: expected 0, because no step that is differentiated \(the last 1\) has noise",
  ),
  (
    "draft",
    {**NO_NOISE, "evaluation__every": 1, "guard__action": "warn", "guard__kl_budget": 1.0},
    "kl_budget: expected 0, because every step",
  ),
  ("draft", {"evaluation__features": "clap"}, "features: expected one of .*, got 'clap'"),
])
def test_a_wrong_config_is_refused_before_anything_is_written(
  name, changes, message, make_config, tmp_path
):
  with pytest.raises(ValueError, match=message) as error:
    train.train(make_config(name, "", **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  assert len(str(error.value).splitlines()) <= 3
