"""The average of the parameters (EMA) is what a run is judged, sampled and exported with.

Whole runs of a model of three numbers, with steps so large that raw and averaged parameters make
visibly different pictures. What each command shows has to be that of the average, which is read
from the checkpoints, and not that of the parameters themselves.
"""

import json
import shutil
import subprocess
import sys

import device_jobs
import jax
import numpy as np
import pytest
import toy_model
from PIL import Image

from jaxalign import evaluate, export, system, train
from jaxalign.cli import command as command_lib
from jaxalign.evaluation import evaluation
from jaxalign.training import checkpoint, guard, metrics
from jaxalign.training import workdir as workdir_lib

NUM_ITERATIONS, DECAY = 4, 0.5
REWARD = "toy_model:brightness"
NAMES = ("ema", "params")


@pytest.fixture(scope="module")
def config(load_config):
  made = load_config("ddpo", "quicktest")
  made.model.path = toy_model.PATH
  made.lora.targets = ""
  made.num_iterations, made.ema_decay = NUM_ITERATIONS, DECAY
  made.batch.update({"num_records": 4, "group_size": 4, "microbatch": 8})
  made.optim.learning_rate = 0.3
  made.reward.names = made.evaluation.rewards = (REWARD,)
  made.exactness.update({"max_log_prob_gap": 1.0, "tolerance": 1.0})
  made.evaluation.update({"num_samples": 8, "microbatch": 8, "every": 1})
  made.checkpoint.update({"every": 1, "keep": 10})
  return made


class Run:
  """A finished run, and what its states sample, computed from its checkpoints here."""

  def __init__(self, config, workdir):
    self.workdir = workdir
    self.sections = config.to_dict()
    self.system = system.from_config(self.sections)
    self.evaluations = evaluation.make_evaluations(**self.sections["evaluation"])

  def params(self, name, step=None, folder=checkpoint.CHECKPOINTS):
    state = checkpoint.read_latest(self.workdir, folder, step=step)[1]
    return state["params"] if name == "params" else state["copies"].get(name)

  def scores(self, part, name, step=None):
    """The mean reward of a part of the evaluation, of "params" or "ema"."""
    made = getattr(self.evaluations, part).run(self.system, self.params(name, step))
    return made.means("")[REWARD]

  def picture(self, name, step, folder=checkpoint.CHECKPOINTS):
    """What samples/ has to show of a state, from 0 to 1."""
    count = self.sections["samples"]["num_samples"]
    records, samples, _ = self.evaluations.shown.sample(
      self.system, self.params(name, step, folder), num_samples=count
    )
    captions = [record["prompt"] for record in records]
    return np.asarray(self.system.model.modality.picture(samples, captions, 8)) / 255

  def drawn(self, step):
    """What it does show."""
    return np.asarray(Image.open(self.workdir / "samples" / f"step_{step:06d}.png")) / 255


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train.train(config, workdir)
  return Run(config, workdir)


def assert_of_the_average(found, of):
  """`found` is what `of("ema")` gives, and visibly not what `of("params")` does."""
  average, raw = (np.asarray(of(name)) for name in NAMES)
  np.testing.assert_allclose(found, average, atol=1e-5)
  assert np.abs(average - raw).max() > 0.01


def bias(params):
  return params["params"]["layer"]["bias"]


def test_the_average_is_of_the_parameters_of_every_iteration(run):
  average = np.zeros(3)  # the base model's
  for step in range(1, NUM_ITERATIONS + 1):
    raw = bias(run.params("params", step))
    average = DECAY * average + (1 - DECAY) * raw
    np.testing.assert_allclose(bias(run.params("ema", step)), average, atol=1e-6)


def test_evaluations_during_the_run_are_of_the_average(run):
  logged = metrics.read(run.workdir)
  assert len(logged) == NUM_ITERATIONS
  for record in logged:
    step = int(record["step"]) + 1
    assert_of_the_average(
      record[f"eval/{REWARD}"], lambda name, step=step: run.scores("validation", name, step)
    )


def test_pictures_during_the_run_are_of_the_average(run):
  for step in (2, NUM_ITERATIONS):
    assert_of_the_average(run.drawn(step), lambda name, step=step: run.picture(name, step))


def reported(workdir):
  return json.loads((workdir / "evaluation.json").read_text())["rewards"][REWARD]


def assert_compared(report, run):
  assert_of_the_average(report["aligned"], lambda name: run.scores("test", name))
  base = run.evaluations.test.run(run.system, run.system.policy.params).means("")[REWARD]
  assert report["base"] == pytest.approx(base, abs=1e-6)
  difference = run.scores("test", "ema") - base
  assert report["difference"] == pytest.approx(difference, abs=1e-5)


def test_the_final_comparison_is_of_the_average(run):
  assert_compared(reported(run.workdir), run)


def test_a_run_that_is_read_back_is_its_average(run):
  found = workdir_lib.load(run.workdir)
  assert found.step == NUM_ITERATIONS
  assert_of_the_average(bias(found.params), lambda name: bias(run.params(name)))


def given(command, *arguments):
  """Calls the main function of a command with flags, as from a command line."""
  command.main(command_lib.parse(command.define_flags, *arguments))


def test_evaluate_compares_the_average(run, tmp_path):
  workdir = shutil.copytree(run.workdir, tmp_path / "run")
  (workdir / "evaluation.json").unlink()
  given(evaluate, f"--workdir={workdir}")
  assert_compared(reported(workdir), run)


def exported(folder):
  return json.loads((folder / "model.json").read_text())["bias"]


def test_half_of_the_training_is_half_of_the_average(run, tmp_path):
  output = tmp_path / "exported"
  given(export, f"--workdir={run.workdir}", f"--output={output}", "--strength=0.5")
  assert_of_the_average(exported(output), lambda name: bias(run.params(name)) / 2)  # base: 0


def test_export_writes_the_average(run, tmp_path):
  output = tmp_path / "exported"
  given(export, f"--workdir={run.workdir}", f"--output={output}")
  assert_of_the_average(exported(output), lambda name: bias(run.params(name)))


def test_sample_draws_with_the_average(run, tmp_path, compilation_cache):
  prompts = ["a", "bc"]
  noise = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
  np.save(tmp_path / "noise.npy", noise)
  command = [sys.executable, "-m", "jaxalign.sample", f"--workdir={run.workdir}"]
  drawn = [*(f"--prompt={prompt}" for prompt in prompts), "--eta=0", "--latents=noise.npy"]
  job = subprocess.run(
    [*command, *drawn, "--output=out", "--output_type=npy"],
    cwd=tmp_path,
    env=device_jobs.environment(compilation_cache),
    capture_output=True,
    text=True,
  )
  assert job.returncode == 0, job.stderr
  found = np.load(tmp_path / "out" / "images.npy")
  still = system.from_config({**run.sections, "process": {**run.sections["process"], "eta": 0.0}})
  tokens = still.model.tokenize([{"prompt": prompt} for prompt in prompts])

  def images(name):
    given = (run.params(name), still.frozen, tokens, noise, jax.random.key(0))
    return jax.jit(still.sample)(*given, still.pipeline.table).samples

  assert_of_the_average(found, images)


@pytest.fixture(scope="module")
def ended(config, tmp_path_factory):
  """A run that a guard ends, its second evaluation and all others below the first."""
  changed = config.copy_and_resolve_references()
  changed.evaluation.rewards = (f"{__name__}:falling",)
  changed.guard.update({"action": "stop", "gold": f"{__name__}:falling", "patience": 2})
  changed.samples.every = 0
  workdir = tmp_path_factory.mktemp("ended")
  falling.calls = 0
  train.train(changed, workdir)
  return Run(changed, workdir)


def falling(images, records):
  """By call: the base model's score, then one that is above it, then lower ones."""
  score = [0.5, 0.9, 0.3, 0.2][min(falling.calls, 3)]
  falling.calls += 1
  return np.full(len(images), score) + 1e-6 * images.mean((1, 2, 3))


def test_a_guard_ends_a_run_with_the_average_of_its_best_iteration(ended):
  assert guard.kept(ended.workdir) == guard.Kept(1, ended=True)
  assert len(metrics.read(ended.workdir)) == 3  # two without a new best are borne, not three
  found = workdir_lib.load(ended.workdir)
  assert_of_the_average(
    bias(found.params), lambda name: bias(ended.params(name, 1, checkpoint.BEST))
  )
  # The last picture is drawn after the guard has chosen.
  assert_of_the_average(ended.drawn(1), lambda name: ended.picture(name, 1, checkpoint.BEST))


def test_without_an_average_all_of_it_is_of_the_parameters(config, tmp_path):
  changed = config.copy_and_resolve_references()
  changed.ema_decay, changed.num_iterations = 0.0, 1
  train.train(changed, tmp_path)
  run = Run(changed, tmp_path)
  assert run.params("ema") is None
  (record,) = metrics.read(tmp_path)
  scores = run.scores("validation", "params")
  assert record[f"eval/{REWARD}"] == pytest.approx(scores, abs=1e-6)
  np.testing.assert_allclose(bias(workdir_lib.load(tmp_path).params), bias(run.params("params")))
