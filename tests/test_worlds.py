"""Worlds without texts and images, through the main command: the right answer, and resumed."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped
from device_jobs import records, without_the_last_iteration
from PIL import Image

from jaxalign import evaluate, methods, train
from jaxalign.diffusion import forward
from jaxalign.labels.base import Labels
from jaxalign.training import checkpoint
from jaxalign.training import workdir as workdir_lib
from jaxalign.worlds import gaussian

WORLDS = ("ddpo_gaussian", "ddpo_planner")
# Methods whose optimum is the tilted reference, and what is changed to be done in some seconds.
ANSWERS = {
  "ddpo_gaussian": {},
  "rwr_gaussian": {"num_iterations": 120, "optim.decay_steps": 120, "process.num_steps": 96},
  "online_dpo_gaussian": {"num_iterations": 120, "optim.decay_steps": 120},
}


@shipped.programs()  # hundreds of iterations
@pytest.mark.parametrize("name", ANSWERS)
def test_it_reaches_the_tilted_gaussian(name, load_config, tmp_path):
  """The mean within a tenth of its way, the spread within a twentieth: 64 steps are not many."""
  config = load_config(name)
  config.update_from_flattened_dict(ANSWERS[name])
  config.samples.every = 0
  train.train(config, tmp_path)
  learned = workdir_lib.load(tmp_path).params["params"]
  reference = gaussian.Mixture(
    np.zeros(1), np.array([[0.5, -0.3]]), np.diag(np.square([1.0, 0.7]))[None]
  )
  reward = gaussian.QuadraticReward(np.diag([0.6, 1.0]), np.array([0.8, -0.5]))
  (tilted, _) = gaussian.tilt(reference, reward, 1.0)
  way = np.linalg.norm(tilted.means[0] - reference.means[0])
  assert np.linalg.norm(learned["mean"] - tilted.means[0]) < 0.1 * way
  std = np.sqrt(np.diagonal(tilted.covs[0]))
  np.testing.assert_allclose(np.exp(learned["log_std"]), std, rtol=0.05)
  report = json.loads((tmp_path / "evaluation.json").read_text())
  assert report["rewards"]["gaussian_quadratic"]["interval_95"][0] > 0
  steps = config.process.num_steps
  assert 0.05 < report["kl_to_ref"] < 0.2 and report["kl_steps"] == [steps - 1, steps]


@pytest.fixture(scope="module", params=WORLDS)
def run(request, load_config, tmp_path_factory):
  """`(name, config, workdir)` of a finished run of two iterations."""
  config = load_config(request.param, "quicktest")
  workdir = tmp_path_factory.mktemp(request.param)
  train.train(config, workdir)
  return request.param, config, workdir


def test_a_run_writes_pictures_and_a_report(run):
  name, _, workdir = run
  assert len(records(workdir)) == 2
  unit = {"ddpo_gaussian": "points", "ddpo_planner": "plans"}[name]
  assert f"throughput/{unit}_per_s" in (workdir / "metrics.jsonl").read_text()
  for picture in ("before_after.png", "reward_curve.png", "samples/step_000002.png"):
    assert np.asarray(Image.open(workdir / picture).convert("L")).std() > 5
  assert json.loads((workdir / "evaluation.json").read_text())["part"] == "test"


def test_one_iteration_and_one_more_equal_two(run, tmp_path):
  _, config, workdir = run
  parts = without_the_last_iteration(workdir, tmp_path / "parts")
  train.train(config, parts)
  assert records(parts) == records(workdir)


def raft(pipeline, *, keep):
  """A method from outside the package, with data of a new kind: of each record the best samples.

  RAFT (arXiv:2304.06767): the loss of diffusion training on the `keep` best, and nothing else.
  """

  def label(memory, scores, key):
    P, K = scores.total.shape
    best = jnp.argsort(-scores.total, axis=1)[:, :keep]
    samples = (best + K * jnp.arange(P)[:, None]).reshape(-1).astype(jnp.int32)
    of_best = jnp.take_along_axis(scores.total, best, axis=1)
    return memory, Labels(samples, {"reward": of_best.reshape(-1)}, {"kept": of_best.mean()})

  def loss(variables, frozen, batch, key):
    row, eps = forward.draw(key, pipeline.levels, len(batch.x_0), batch.x_0.shape[1:])
    error = forward.denoising_error(
      pipeline.conditional.denoise_fn, variables, row, pipeline.prediction_type, batch.x_0, eps,
      batch.cond,
    )
    return error, {"reward/kept": batch.labels["reward"]}

  return methods.Method(loss, methods.Rollouts(label, by="sample"))


def test_a_method_from_outside_with_data_of_its_own(load_config, tmp_path):
  """One file, named in a config, that this package knows nothing of; and it learns."""
  config = load_config("rwr_gaussian")
  config.method = {"name": f"{__name__}:raft", "keep": 2}
  config.update_from_flattened_dict({
    "num_iterations": 12, "optim.decay_steps": 0, "process.num_steps": 16, "samples.every": 0,
    "batch.num_records": 8, "batch.group_size": 8, "batch.microbatch": 16,
  })
  train.train(config, tmp_path)
  written = records(tmp_path)
  assert all(record["kept"] > record["reward/mean"] for record in written)
  assert written[0]["reward/kept"] == pytest.approx(written[0]["kept"], abs=1e-5)
  report = json.loads((tmp_path / "evaluation.json").read_text())
  assert report["rewards"]["gaussian_quadratic"]["interval_95"][0] > 0


def with_critic(pipeline, *, kl_weight, advantage):
  """A method from outside the package with a head: DDPO, and a critic of what samples are worth."""
  ddpo = methods.make("ddpo_sf", pipeline, kl_weight=kl_weight, advantage=advantage)
  every = ddpo.data.label

  def label(memory, scores, key):
    memory, labels = every(memory, scores, key)
    values = {**labels.values, "reward": jnp.ravel(scores.total)}
    return memory, dataclasses.replace(labels, values=values)

  def loss(variables, frozen, batch, key):
    value, metrics = ddpo.loss(variables, frozen, batch, key)
    error = jnp.square(variables["heads"]["critic"]["value"] - batch.labels["reward"])
    return value + error, {**metrics, "critic/error": error}

  critic = methods.Head(lambda key: {"value": jnp.float32(5.0)}, learning_rate=0.5)
  return methods.Method(loss, ddpo.data._replace(label=label), heads={"critic": critic})


def test_a_critic_is_trained_beside_the_policy_resumed_and_not_exported(load_config, tmp_path):
  config = load_config("ddpo_gaussian", "quicktest")
  config.method = {"name": f"{__name__}:with_critic", "kl_weight": 0.0}
  config.update_from_flattened_dict({"num_iterations": 12, "samples.every": 0})
  train.train(config, tmp_path / "whole")
  errors = [record["critic/error"] for record in records(tmp_path / "whole")]
  assert np.mean(errors[-3:]) < 0.2 * errors[0]
  state = checkpoint.read_latest(tmp_path / "whole")[1]
  assert abs(state["heads"]["critic"]["value"] - 5.0) > 2.0
  shorter = config.copy_and_resolve_references()
  shorter.num_iterations = 5
  train.train(shorter, tmp_path / "parts")
  train.train(config, tmp_path / "parts")
  assert records(tmp_path / "parts") == records(tmp_path / "whole")
  assert set(workdir_lib.load(tmp_path / "whole").params) == {"params"}


@pytest.mark.parametrize("name, changes", [
  ("nft_planner", {"method.decay_rate": 0.5}),
  ("mix_grpo_planner", {"method.window_size": 1}),
  ("online_dpo_planner", {"method.refresh": 1, "ema_decay": 0.5}),
])
def test_copies_and_windows_are_resumed_to_the_bit(name, changes, load_config, tmp_path):
  config = load_config(name, "quicktest")
  config.samples.every = 0
  config.update_from_flattened_dict(changes)
  train.train(config, tmp_path / "whole")
  train.train(config, without_the_last_iteration(tmp_path / "whole", tmp_path / "parts"))
  assert records(tmp_path / "parts") == records(tmp_path / "whole")
  whole, parts = (checkpoint.read_latest(tmp_path / part)[1] for part in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  assert set(whole["copies"]) == {
    "nft_planner": {"old"}, "mix_grpo_planner": set(), "online_dpo_planner": {"reference", "ema"}
  }[name]


def test_stored_plans_are_learned_from_and_resumed_to_the_bit(
  load_config, plan_pairs_file, tmp_path
):
  config = load_config("kto_planner", "quicktest")
  config.update_from_flattened_dict({"data.source": str(plan_pairs_file), "samples.every": 0})
  train.train(config, tmp_path / "whole")
  written = records(tmp_path / "whole")
  assert len(written) == 2 and all(record["grad/norm"] > 0 for record in written)
  report = json.loads((tmp_path / "whole" / "preferences_report.json").read_text())
  assert report["num_records"] == 12 and not report["bad"]
  train.train(config, without_the_last_iteration(tmp_path / "whole", tmp_path / "parts"))
  assert records(tmp_path / "parts") == written
  whole, parts = (checkpoint.read_latest(tmp_path / part)[1] for part in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_a_dry_run_on_stored_plans_states_memory_and_speed_and_writes_nothing(
  load_config, plan_pairs_file, tmp_path, capsys
):
  config = load_config("kto_planner", "quicktest")
  config.data.source = str(plan_pairs_file)
  train.train(config, tmp_path / "run", dry_run=True)
  printed = capsys.readouterr().out
  assert "memory per device" in printed and "plans/s" in printed
  assert re.search(r"largest microbatch: about [1-9]\d*, where the (update|encoding)", printed)
  assert not list(tmp_path.iterdir())


def test_the_main_command_learns_from_stored_plans(command, plan_pairs_file, tmp_path):
  root = pathlib.Path(__file__).resolve().parents[1]
  config = f"--config={root}/configs/kto_planner.py:quicktest"
  job = command(
    "main", config, "--workdir=run", f"--config.data.source={plan_pairs_file}", cwd=tmp_path
  )
  _, errors = job.communicate(timeout=200)
  assert job.returncode == 0, errors
  report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert set(report["rewards"]) == {"planner_success", "planner"}


@pytest.mark.parametrize("changes, message", [
  ({"data.resize": True}, "resize: expected False, because plans cannot be resized; got True"),
  ({"data.source": "{short}"}, r"expected plans of shape \(16, 2\), found one of \(8, 2\)"),
  ({"data.source": "{asked}"}, r'data\.source: record 0: expected a "goal" of two numbers'),
  ({"data.source": "{image}"}, r"unreadable sample\n.*whole \.npy array"),
])  # fmt: skip
def test_stored_samples_that_a_model_cannot_learn_from(changes, message, load_config, tmp_path):
  for path, steps in (("long", 16), ("short", 8)):
    np.save(tmp_path / f"{path}.npy", np.zeros((steps, 2), np.float32))
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  ends = {"start": [-0.9, 0], "goal": [0.9, 0]}
  rows = {
    "short": (ends, "short.npy"), "asked": ({"start": [-0.9, 0]}, "long.npy"),
    "image": (ends, "a.png"),
  }  # fmt: skip
  for name, (record, sample) in rows.items():
    row = {"record": record, "samples": [sample] * 2, "label_0": 1}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
  config = load_config("kto_planner", "quicktest")
  config.data.source = str(tmp_path / "short.jsonl")
  files = {name: tmp_path / f"{name}.jsonl" for name in rows}
  config.update_from_flattened_dict({
    key: value.format(**files) if isinstance(value, str) else value
    for key, value in changes.items()
  })
  with pytest.raises(ValueError, match=message) as error:
    train.train(config, tmp_path / "run")
  assert len(str(error.value).splitlines()) <= 3 and not (tmp_path / "run").exists()


def test_it_is_sampled_by_the_command(run, command, tmp_path):
  name, _, workdir = run
  record = {"ddpo_gaussian": "{}", "ddpo_planner": '{"start": [-0.9, 0.0], "goal": [0.9, 0.1]}'}
  job = command("sample", f"--workdir={workdir}", f"--record={record[name]}", cwd=tmp_path)
  printed, errors = job.communicate(timeout=200)
  assert job.returncode == 0, errors
  assert np.isfinite(np.load(tmp_path / printed.split()[-1])).all()


def test_it_is_evaluated_again_to_the_same_report(run, capsys):
  _, _, workdir = run
  before = json.loads((workdir / "evaluation.json").read_text())
  evaluate.evaluate_run(workdir)
  again = json.loads((workdir / "evaluation.json").read_text())
  for name, row in before["rewards"].items():  # to the last places of another program
    assert again["rewards"][name]["base"] == pytest.approx(row["base"], rel=1e-5)
    assert again["rewards"][name]["aligned"] == pytest.approx(row["aligned"], rel=1e-5)
  assert again["kl_to_ref"] == pytest.approx(before["kl_to_ref"], rel=1e-5)
  assert "of 4 records" in capsys.readouterr().out


@pytest.mark.parametrize("name, changes, message", [
  ("ddpo_gaussian", {"guidance.scale": 2.0}, "scale: expected 1, because this model has no input"),
  (
    "ddpo_planner",
    {"data.source": "shapes/train"},
    r'config.data.source: record 0: expected a "start" of two numbers',
  ),
  (
    "ddpo_planner",
    {"evaluation.source": "shapes/test"},
    r'config.evaluation: shapes/test: record 0: expected a "start"',
  ),
  ("ddpo_planner", {"evaluation.features": "pixels"}, "features: expected one of waypoints"),
])
def test_what_a_world_has_not_is_refused(name, changes, message, load_config, tmp_path):
  config = load_config(name, "quicktest")
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    train.train(config, tmp_path / "run")
