"""Adapters merged into one kernel (`lora.form`): trained, evaluated and exported like others."""

import jax
import numpy as np
import pytest
from device_jobs import case_flags, finish, records, start

from jaxalign import system, train
from jaxalign.evaluation import evaluation
from jaxalign.models.adapters import lora
from jaxalign.models.families import stable_diffusion
from jaxalign.models.weights import lora_files
from jaxalign.training import workdir as workdir_lib


@pytest.fixture(scope="module")
def workdir(small_model, tmp_path_factory, compilation_cache):
  """Of the main command: two iterations of DDPO with two updates each, in float32."""
  folder = tmp_path_factory.mktemp("merged") / "run"
  changes = ("--config.lora.form=merged", "--config.num_iterations=2")
  flags = case_flags("an adapter", folder, small_model, *changes)
  finish(start(flags, compilation_cache, compiled=""))  # whose last places count
  return folder


@pytest.fixture(scope="module")
def trained(workdir):
  return workdir_lib.load(workdir)


@pytest.fixture(scope="module")
def scores(load_config, tmp_path_factory):
  """By form: the evaluation of a run on the planner, its adapter in the kernels and beside them."""
  config = load_config("ddpo_planner", "lora,quicktest")
  config.lora.form = "merged"
  config.optim.learning_rate = 1e-2
  workdir = tmp_path_factory.mktemp("plans")
  train.train(config, workdir)
  trained = workdir_lib.load(workdir)
  evaluate = evaluation.make_evaluations(**trained.config["evaluation"]).test
  side = {**trained.config, "lora": {**trained.config["lora"], "form": "side"}}
  beside = system.from_config(side)
  return {
    "merged": evaluate.run(trained.system, trained.params, kl=True),
    "side": evaluate.run(beside, trained.params, kl=True),
    "base": evaluate.run(beside, beside.policy.params),
  }


def test_rollout_and_update_agree_to_the_bit(workdir):
  found = records(workdir)
  assert [record["policy/log_prob_gap"] for record in found] == [0.0, 0.0]
  assert [record["policy/first_ratio_max_error"] for record in found] == [0.0, 0.0]
  assert all(record["grad/norm"] > 0.0 for record in found)
  assert (workdir / "evaluation.json").is_file()


def test_the_adapter_beside_its_layers_gives_the_same_but_for_rounding(scores):
  merged, side, base = (scores[form] for form in ("merged", "side", "base"))
  assert 0.0 < np.abs(merged.samples - side.samples).max() < 1e-4
  assert np.abs(merged.samples - base.samples).max() > 1e-2  # the adapter has done something
  assert merged.kl.mean() > 0.0
  others = side.means("")
  assert others.pop("diversity") is None  # no record has two samples
  for name, value in others.items():
    assert merged.means("")[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_exports_hold_what_is_applied_to_the_bit(trained, workdir, command, tmp_path):
  for form in ("lora", "diffusers"):
    flags = (f"--workdir={workdir}", f"--format={form}", f"--output={form}")
    finish(command("export", *flags, cwd=tmp_path))
  policy, unet = trained.system.policy, trained.system.model.params["denoiser"]
  applied = policy.variables(trained.params, policy.base)["lora"]
  file = lora_files.read(tmp_path / "lora", {"unet": unet}).at_strength(1.0)["unet"]
  jax.tree.map(np.testing.assert_array_equal, file, applied)
  whole = stable_diffusion.load(tmp_path / "diffusers").params["unet"]
  jax.tree.map(np.testing.assert_array_equal, whole, lora.merge(policy.base["params"], applied))
