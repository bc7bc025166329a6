"""The commands as a user types them: what they exit with and what they say."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxalign.models.weights import hub
from jaxalign.training import checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
DDPO = f"--config={ROOT}/configs/ddpo.py:quicktest"


def assert_refused(process, *words):
  """Non-zero exit, no traceback, and one to three lines that hold `words`."""
  _, printed = process.communicate()
  assert process.returncode not in (0, None)
  assert "Traceback" not in printed
  message = printed[printed.index("error: ") :].strip()
  assert 1 <= len(message.splitlines()) <= 3
  for word in words:
    assert word in message


@pytest.mark.parametrize("flags,words", [
  ((DDPO, "--workdir=run", "--config.metod.clip_range=1"), ("metod", "method")),
  ((DDPO, "--workdir=run", "--config.num_iterations=many"), ("many",)),
  ((DDPO,), ("--workdir",)),
  (("--config=missing.py", "--workdir=run"), ("missing.py",)),
  ((f"{DDPO}t", "--workdir=run"), ("unknown variant 'quicktestt'",)),
  ((DDPO, "--workdir=run", "extra"), ("extra",)),
  ((DDPO, "--workdir=run", "--wordkir=x"), ("wordkir",)),
  ((DDPO, "--workdir=run", "--distributed"), ("--coordinator_address",)),
])
def test_main_refuses_wrong_flags(command, tmp_path, flags, words):
  assert_refused(command("main", *flags, cwd=tmp_path), *words)
  assert list(tmp_path.iterdir()) == []


def test_main_finds_what_configs_share_from_any_folder(tmp_path):
  """The package alone on the path, and no config near: as an editable install has it."""
  (tmp_path / "path").mkdir()
  (tmp_path / "path" / "jaxalign").symlink_to(ROOT / "jaxalign")
  process = subprocess.Popen(
    [sys.executable, "-m", "jaxalign.main", DDPO, "--config.metod.clip_range=1"],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert_refused(process, "metod", "method")  # the config was loaded


def test_a_damaged_model_folder_is_refused(command, tmp_path):
  """One command for each kind of damage; the messages themselves are tested in test_weights."""
  shutil.copytree(hub.find_folder("shapes"), tmp_path / "model")
  weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  flags = ("--model=model", "--prompt=a circle", "--output=pictures")
  assert_refused(command("sample", *flags, cwd=tmp_path), "download it again")
  weights.unlink()
  assert_refused(command("sample", *flags, cwd=tmp_path), "diffusion_pytorch_model.safetensors")
  index = {"weight_map": {"conv_in.bias": "shard-1.safetensors"}}
  (weights.parent / f"{weights.name}.index.json").write_text(json.dumps(index))
  assert_refused(command("sample", *flags, cwd=tmp_path), "shard-1.safetensors", "found no such")
  (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
  flags = ("--model=model.ckpt", "--prompt=a circle", "--output=pictures")
  assert_refused(command("sample", *flags, cwd=tmp_path), "a pickle", "Convert it once")
  assert not (tmp_path / "pictures").exists()


def test_sample_and_evaluate_refuse_wrong_flags(command, tmp_path):
  assert_refused(command("sample", "--prompt=a circle", cwd=tmp_path), "--model", "--workdir")
  assert_refused(command("sample", "--model=shapes", cwd=tmp_path), "--prompt")
  np.save(tmp_path / "noise.npy", np.zeros((1, 8, 16, 16), np.float32))
  flags = ("--model=shapes", "--prompt=a circle", "--latents=noise.npy")
  assert_refused(command("sample", *flags, cwd=tmp_path), "[1, 8, 8, 8]", "[1, 8, 16, 16]")
  assert_refused(command("evaluate", "--workdir=nothing", cwd=tmp_path), "nothing/config.json")


def test_sample_and_evaluate_on_the_embedded_model(command, tmp_path):
  flags = ("--model=shapes", "--prompt=a circle", "--prompt=two rings", "--num_steps=4")
  process = command("sample", *flags, "--output=pictures", cwd=tmp_path)
  printed, errors = process.communicate()
  assert process.returncode == 0, errors
  expected = [tmp_path / "pictures" / name for name in ("0000.png", "0001.png")]
  assert printed.split() == [str(file) for file in expected]
  assert all(file.stat().st_size > 100 for file in expected)
  process = command(
    "evaluate", "--model=shapes", "--rewards=shapes,jpeg_compressibility", "--num_steps=4",
    "--prompts=shapes/held_out", "--num_images=6", "--microbatch=2",
    cwd=tmp_path,
  )
  printed, errors = process.communicate()
  assert process.returncode == 0, errors
  values = dict(line.split() for line in printed.splitlines())
  assert 0.0 <= float(values["shapes"]) <= 1.0
  assert -10.0 < float(values["jpeg_compressibility"]) < -0.5


@pytest.mark.slow
def test_five_kills_leave_no_trace_in_the_parameters(command, tmp_path):
  flags = (
    DDPO,
    "--config.num_iterations=40",
    "--config.checkpoint.every=2",
    "--config.samples.every=100",
    "--config.ema_decay=0.9",
  )
  process = command("main", *flags, "--workdir=whole", cwd=tmp_path)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  rng, kills = random.Random(0), 0
  while kills < 5:
    process = command("main", *flags, "--workdir=killed", cwd=tmp_path)
    seen = _lines(tmp_path / "killed")
    while process.poll() is None and _lines(tmp_path / "killed") < seen + 2:
      time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    assert process.poll() is None, "finished before it could be killed: raise num_iterations"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
  process = command("main", *flags, "--workdir=killed", cwd=tmp_path)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  whole, killed = (checkpoint.read_latest(tmp_path / name) for name in ("whole", "killed"))
  assert whole[0] == killed[0] == 40
  jax.tree.map(np.testing.assert_array_equal, whole[1], killed[1])


def _lines(workdir):
  path = workdir / "metrics.jsonl"
  return len(path.read_text().splitlines()) if path.exists() else 0
