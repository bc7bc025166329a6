"""`--dry_run --topology`: every feed, without weights, and what is said to mistakes.

Here the described devices are this process's own CPUs, called described: the compilers for others
are an extra. tests/test_aot.py has those.
"""

import shutil

import device_jobs
import jax
import pytest

from jaxalign.aot import topology
from jaxalign.distributed import sharding
from jaxalign.training import described_dry_run


@pytest.fixture(scope="module")
def without_weights(small_model, tmp_path_factory):
  """The folder of a small model that holds configs and tokenizer alone."""
  folder = tmp_path_factory.mktemp("described") / "model"
  shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
  return folder


@pytest.fixture
def described(monkeypatch):
  monkeypatch.setattr(sharding, "is_described", lambda mesh: True)
  return topology.Topology("some", jax.devices()[:1], topology.GPUS["h100"])


@pytest.mark.parametrize("name, programs", [
  ("ddpo", ["rollout: 2 samples, 4 steps", "transitions"]),
  pytest.param(
    "d3po", ["rollout: 4 samples, 4 steps", "transition pairs"], marks=pytest.mark.slow
  ),
  ("dpo", ["encoding: 2 pairs", "pairs"]),
  pytest.param("draft", ["conditioning: 2 records", "records"], marks=pytest.mark.slow),
])  # fmt: skip
def test_every_feed(
  name, programs, load_config, without_weights, small_model, described, tmp_path, capsys
):
  config = load_config(name, "quicktest,lora" if name != "d3po" else "quicktest")
  config.model.path = str(without_weights)
  if name == "dpo":
    config.data.source = str(small_model.parent / "pairs.jsonl")
  described_dry_run.rehearse(config, tmp_path / "run", described)
  printed = capsys.readouterr().out
  first, second = programs
  assert f"\n{first}\n" in printed
  assert "\nupdate: " in printed and second in printed
  # Every program says what it takes of the described memory, and is near the least work.
  assert printed.count("of 79.1 GiB") == 2
  work = [line for line in printed.splitlines() if "work:" in line]
  shares = [float(line.split(", ")[1].split()[0]) for line in work]
  assert all(0.95 <= share <= 1.15 for share in shares), shares
  assert not (tmp_path / "run").exists()


def test_a_run_still_needs_its_weights(load_config, without_weights, tmp_path):
  from jaxalign import train

  config = load_config("ddpo", "quicktest")
  config.model.path = str(without_weights)
  with pytest.raises(ValueError, match="no weights: expected"):
    train.train(config, tmp_path / "run", dry_run=True)


def test_the_mesh_is_of_the_described_devices(load_config, without_weights, described, tmp_path):
  config = load_config("ddpo", "quicktest")
  config.model.path = str(without_weights)
  config.mesh.update({"data": 2, "fsdp": 4})
  with pytest.raises(ValueError, match=r"expected data x fsdp = 1, the number of devices"):
    described_dry_run.rehearse(config, tmp_path / "run", described)


@pytest.mark.parametrize("flags, expected", [
  (["--topology=8xh100"], "expected it with --dry_run"),
  (["--topology=8xb200", "--dry_run"], "known: a100, h100, h200"),
])  # fmt: skip
def test_mistakes_end_with_a_line_or_two(flags, expected, command, tmp_path):
  config = f"--config={device_jobs.ROOT}/configs/ddpo.py:quicktest"
  process = command("main", config, f"--workdir={tmp_path}/run", *flags, cwd=tmp_path)
  _, errors = process.communicate(timeout=100)
  assert process.returncode == 1 and expected in errors
  assert "Traceback" not in errors and len(errors.strip().splitlines()) <= 3


