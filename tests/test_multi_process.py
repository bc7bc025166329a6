"""Two processes do what one does, end together, and continue what a killed job began."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from device_jobs import CASES, ROOT, assert_close, case_flags, environment, finish, records

from jaxalign.training import checkpoint

STATED_SECONDS = 60  # docs/devices.md: within this time of a process's death the others have ended


@pytest.fixture(scope="module")
def launch(small_model, compilation_cache):
  """`launch(workdir, *flags, name=...)`: launch/local.sh with two processes and a case."""

  def launch(workdir, *flags, name="plans"):
    model = "planner" if name.startswith("plans") else small_model
    all_flags = case_flags(name, workdir, model, *flags)
    return subprocess.Popen(
      [ROOT / "launch" / "local.sh", "2", *all_flags],
      env={**environment(compilation_cache), "PYTHON": sys.executable},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return launch


def wait_for_lines(job, workdir, count):
  """Until the metrics have `count` lines."""
  path = workdir / "metrics.jsonl"
  while not path.exists() or len(path.read_text().splitlines()) < count:
    assert job.poll() is None, job.communicate()[0]
    time.sleep(0.05)


def children(pid):
  """The processes that `pid` has started, oldest first."""
  found = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
  return [int(child) for child in found.split()]


@pytest.fixture(scope="module")
def killed(launch, tmp_path_factory):
  """`(workdir, what was printed, seconds until all had ended)` of a job that lost a process."""
  workdir = tmp_path_factory.mktemp("killed") / "run"
  job = launch(workdir)
  wait_for_lines(job, workdir, 3)
  os.kill(children(job.pid)[1], signal.SIGKILL)
  began = time.monotonic()
  printed, _ = job.communicate(timeout=2 * STATED_SECONDS)
  assert job.returncode != 0
  return workdir, printed, time.monotonic() - began


@pytest.fixture(scope="module")
def relaunched(killed, launch, tmp_path_factory):
  """The workdir of the same job, started again by the same command."""
  workdir = tmp_path_factory.mktemp("relaunched") / "run"
  shutil.copytree(killed[0], workdir)
  finish(launch(workdir))
  return workdir


def test_a_killed_process_ends_the_others_with_a_message(killed):
  _, printed, seconds = killed
  assert seconds < STATED_SECONDS
  assert "process 0 of 2 lost another one" in printed
  assert "continues from the last checkpoint" in printed
  assert "Traceback" not in printed


def test_two_processes_do_what_one_does(killed, run_case):
  """As far as the killed job came."""
  alone = records(run_case("plans", ["one device"], "planner")["one device"])
  found = records(killed[0])
  assert len(found) >= 3
  assert_close(found, alone[: len(found)], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"plans"}))
def test_two_processes_do_what_one_does_in_every_case(name, launch, run_case, tmp_path):
  finish(launch(tmp_path / "run", name=name))
  model = ("planner",) if name.startswith("plans") else ()
  alone = run_case(name, ["one device"], *model)["one device"]
  assert_close(records(tmp_path / "run"), records(alone), 1e-5)


@pytest.mark.slow
def test_the_relaunched_job_does_what_one_process_does(relaunched, run_case):
  alone = run_case("plans", ["one device"], "planner")["one device"]
  assert_close(records(relaunched), records(alone), 1e-5)
  assert checkpoint.read_latest(relaunched)[0] == 5
  assert (relaunched / "evaluation.json").exists()


@pytest.mark.slow
def test_the_relaunched_job_ends_with_the_bits_of_an_undisturbed_one(
  relaunched, launch, tmp_path
):
  finish(launch(tmp_path / "run"))
  found, expected = checkpoint.read_latest(relaunched), checkpoint.read_latest(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert records(relaunched) == records(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_of_one_process_stops_all_after_the_same_iteration(launch, tmp_path):
  job = launch(tmp_path / "run", "--config.num_iterations=1000", "--config.checkpoint.every=0")
  wait_for_lines(job, tmp_path / "run", 1)
  os.kill(children(job.pid)[1], signal.SIGTERM)
  printed = finish(job)
  step = checkpoint.read_latest(tmp_path / "run")[0]
  assert f"stopped after iteration {step}; the same command continues" in printed
  assert len(records(tmp_path / "run")) == step


def test_an_error_of_the_user_ends_all_processes_at_once(launch, tmp_path):
  job = launch(tmp_path / "run", "--config.mesh.data=3")
  printed, _ = job.communicate(timeout=STATED_SECONDS)
  assert job.returncode == 1
  assert "expected data x fsdp = 2" in printed and "Traceback" not in printed
  assert not (tmp_path / "run").exists()
