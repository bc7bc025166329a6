"""Eight virtual devices do what one does, and continue what others began."""

import shutil

import pytest
from device_jobs import assert_close, finish, records, save_small_model, small_run, start

# Mesh flags by name. All runs of a case start at once.
MESHES = {
  "one device": (1, ()),
  "data 8": (8, ("--config.mesh.data=8",)),
  "data 2 x fsdp 4": (8, ("--config.mesh.data=2", "--config.mesh.fsdp=4")),
}
ROLLOUTS = (
  "--config.batch.num_prompts=4",
  "--config.batch.images_per_prompt=4",
  "--config.batch.microbatch=8",
  "--config.batch.updates_per_epoch=2",
)
SMOOTH = ("--config.reward.names=('device_jobs:brightness',)",)
# Config and variant, and flags that make eight devices share its batches. A new method is a row.
CASES = {
  "full weights": ("ddpo:quicktest,full", (*ROLLOUTS, *SMOOTH)),
  "an adapter": ("ddpo:quicktest,lora", (*ROLLOUTS, *SMOOTH)),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
  return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run_case(small_model, tmp_path_factory, compilation_cache):
  """`run_case(name, model=small_model)`: workdirs of the case's runs by mesh, each run once."""
  done = {}

  def run(name, model=small_model):
    if (name, model) not in done:
      folder = tmp_path_factory.mktemp("runs")
      config, flags = CASES[name]
      jobs = {}
      for mesh, (devices, mesh_flags) in MESHES.items():
        flags_of_run = small_run(folder / mesh, model, *flags, *mesh_flags, config=config)
        jobs[mesh] = start(flags_of_run, compilation_cache, devices=devices)
      for job in jobs.values():
        finish(job)
      done[name, model] = folder
    return {mesh: done[name, model] / mesh for mesh in MESHES}

  return run


@pytest.mark.parametrize("name", [
  "full weights", pytest.param("an adapter", marks=pytest.mark.slow),
])
@pytest.mark.parametrize("mesh", ["data 8", "data 2 x fsdp 4"])
def test_eight_devices_agree_with_one(run_case, name, mesh):
  workdirs = run_case(name)
  found, expected = records(workdirs[mesh]), records(workdirs["one device"])
  assert len(expected) == 5 and expected[0]["grad/norm"] > 0.0
  assert_close(found, expected, TOLERANCE)
  assert all(record["policy/log_prob_gap"] == 0.0 for record in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full weights", "an adapter"])
def test_eight_devices_agree_with_one_on_the_embedded_model(run_case, name):
  workdirs = run_case(name, "shapes")
  expected = records(workdirs["one device"])
  for mesh in ("data 8", "data 2 x fsdp 4"):
    assert_close(records(workdirs[mesh]), expected, TOLERANCE)


def test_a_checkpoint_of_eight_devices_continues_on_one(
  run_case, small_model, tmp_path, compilation_cache
):
  """As after a kill in iteration 3: the checkpoint of iteration 2 is the newest."""
  workdirs = run_case("full weights")
  shutil.copytree(workdirs["data 2 x fsdp 4"], tmp_path / "run")
  for folder in (tmp_path / "run" / "checkpoints").iterdir():
    if folder.name != "2":
      shutil.rmtree(folder)
  config, flags = CASES["full weights"]
  job = start(small_run(tmp_path / "run", small_model, *flags, config=config), compilation_cache)
  finish(job)
  assert_close(records(tmp_path / "run"), records(workdirs["one device"]), TOLERANCE)


@pytest.mark.parametrize("flags,words", [
  (("--config.mesh.data=3",), "expected data x fsdp = 8, the number of devices, got 3 x 1"),
  (("--config.batch.microbatch=4",), "config.batch.microbatch: expected a multiple of 8"),
])
def test_a_batch_or_mesh_that_does_not_fit_is_refused(
  small_model, tmp_path, compilation_cache, flags, words
):
  job = start(
    small_run(tmp_path / "run", small_model, *ROLLOUTS, *SMOOTH, *flags),
    compilation_cache,
    devices=8,
  )
  printed, _ = job.communicate()
  assert job.returncode == 1 and words in printed and "Traceback" not in printed
  assert not (tmp_path / "run").exists()
