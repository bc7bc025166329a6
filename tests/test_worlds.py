"""Worlds without texts and images, through the main command: the right answer, and resumed."""

import json

import numpy as np
import pytest
from absl import flags
from device_jobs import records
from PIL import Image

from jaxalign import evaluate, train
from jaxalign.training import workdir as workdir_lib
from jaxalign.worlds import gaussian

WORLDS = ("ddpo_gaussian", "ddpo_planner")


def test_ddpo_reaches_the_tilted_gaussian(load_config, tmp_path):
  """The mean within a tenth of its way, the spread within a twentieth: 64 steps are not many."""
  config = load_config("ddpo_gaussian")
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
  assert 0.05 < report["kl_to_ref"] < 0.2 and report["kl_steps"] == [63, 64]


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
  flags.FLAGS.mark_as_parsed()  # commands are called here as functions


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
  shorter = config.copy_and_resolve_references()
  shorter.num_iterations = 1
  train.train(shorter, tmp_path)
  train.train(config, tmp_path)
  assert records(tmp_path) == records(workdir)


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
