"""Runs of the main command on several devices or processes, and a small model for them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import shipped
from PIL import Image

from jaxalign.models.families import stable_diffusion
from jaxalign.models.weights import hub
from jaxalign.rewards import DeviceReward

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMING = {f"throughput/{unit}_per_s" for unit in ("images", "plans", "points")} | {"compile/count"}
# The sign of a difference that is a rounding error as long as policy and reference are the same.
SIGNS = {"preference/accuracy"}

# Devices and flags of a mesh.
MESHES = {
  "one device": (1, ()),
  "data 8": (8, ("--config.mesh.data=8",)),
  "data 2 x fsdp 4": (8, ("--config.mesh.data=2", "--config.mesh.fsdp=4")),
}
# How trajectories are shuffled, on one device as on eight.
SHARDS = ("--config.batch.shards=8",)
HOST_REWARD = ("--config.reward.names=('device_jobs:brightness',)",)
# One on the mesh beside one on the host, and in the evaluation too.
BOTH_REWARDS = (
  "--config.reward.names=('device_jobs:brightness','planner')",
  "--config.reward.weights=(1.0,1.0)",
  "--config.reward.kwargs=({{}},{{}})",  # braces, for `case_flags`
  "--config.evaluation.every=2",
  "--config.evaluation.rewards=('planner','device_jobs:brightness')",
)
SIZES = (
  *SHARDS,
  "--config.batch.num_records=4",
  "--config.batch.group_size=4",
  "--config.batch.microbatch=8",
  "--config.batch.updates_per_epoch=2",
)
ROLLOUTS = (*HOST_REWARD, *SIZES)
PAIRS = (
  "--config.data.source={pairs}",
  "--config.batch.num_examples=16",
  "--config.batch.microbatch=8",
)
PROMPTS = (
  "--config.reward.names=('device_jobs:soft_brightness',)",
  "--config.batch.num_examples=16",
  "--config.batch.microbatch=8",
)
ALL_WEIGHTS = ("--config.lora.targets=",)
# Config and variant of a case, and flags that let eight devices share its batches; {pairs} is a
# file of preferences. A new method is a row; "full weights" is what other tests build on.
CASES = {
  "full weights": ("ddpo.py:quicktest,full", ROLLOUTS),
  "an adapter": ("ddpo.py:quicktest,lora", ROLLOUTS),
  # Of the model "planner", as is every case whose name starts so. Long enough to be killed in.
  "plans": ("ddpo_planner.py:quicktest", (*ROLLOUTS, "--config.num_iterations=5")),
  "plans, scored on the mesh": ("ddpo_planner.py:quicktest", (*BOTH_REWARDS, *SIZES)),
  "rollout pairs": (
    "d3po.py:quicktest",
    (*HOST_REWARD, *SHARDS, "--config.batch.num_records=8", "--config.batch.microbatch=16"),
  ),
  "stored pairs": ("dpo.py:quicktest,full", PAIRS),
  "stored pairs, an adapter": ("dpo.py:quicktest,lora", PAIRS),
  "prompts": ("draft.py:quicktest,whole", (*PROMPTS, *ALL_WEIGHTS)),
  "prompts, an adapter": ("draft.py:quicktest,lora", PROMPTS),
}

# The smallest network that has every kind of layer, and some arrays large enough to be cut.
UNET = {
  "sample_size": 8,
  "block_out_channels": [128],
  "down_block_types": ["CrossAttnDownBlock2D"],
  "up_block_types": ["UpBlock2D"],
}
VAE = {
  "sample_size": 16,
  "block_out_channels": [8, 16],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def on_planner(config):
  """The config on the embedded planner, whose programs compile in a fraction of the time."""
  config.model = {"path": "planner"}
  config.lora.targets = "." if config.lora.rank else ""
  config.process = {"transition": "flow_sde", "num_steps": 4, "noise_level": 0.3}
  config.data.source = "planner/train"
  parts = {"source": "planner/test", "validation": "planner/validation"}
  config.evaluation.update({**parts, "rewards": ("planner",), "features": "default"})
  config.guard.gold = "planner"
  if "reward" in config:
    config.reward.names = ("planner",)
  return config


def without_the_last_iteration(workdir, folder):
  """A copy of a run of two iterations as after a kill in the second: one checkpoint is there."""
  shutil.copytree(workdir, folder)
  shutil.rmtree(folder / "checkpoints" / "2")
  assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1"]
  return folder


def save_small_model(folder):
  """A random model with text encoders like the embedded one's, as a diffusers folder."""
  configs, tokenizer = _small_configs()
  return _save_random(stable_diffusion.build(**configs, tokenizer_folder=tokenizer), folder)


def save_small_xl(folder):
  """The same in the manner of Stable Diffusion XL: two text encoders, and sizes beside the time."""
  configs, tokenizer = _small_configs()
  del configs["pipeline"]
  text = configs["text_encoder"]
  configs["text_encoder_2"] = {
    **text,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "projection_dim": 24,
  }
  configs["unet"] |= {
    "cross_attention_dim": text["hidden_size"] + 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
  }
  tokenizers = {"tokenizer_folder": tokenizer, "tokenizer_2_folder": tokenizer}
  return _save_random(stable_diffusion.build(**configs, **tokenizers), folder)


def _small_configs():
  """The embedded model's configs with smaller networks, and its tokenizer."""
  configs = dict(stable_diffusion.load("shapes").configs)
  configs["unet"] = {**configs["unet"], **UNET}
  configs["vae"] = {**configs["vae"], **VAE}
  return configs, hub.find_folder("shapes") / "tokenizer"


def _save_random(model, folder):
  params = jax.device_get(model.init_params(jax.random.key(0)))
  stable_diffusion.save(model.with_params(params), folder)
  return folder


def save_pairs(folder):
  """24 preferences between images of noise, of the size that the small model makes."""
  rng = np.random.default_rng(0)
  lines = []
  for number in range(24):
    names = [f"{number}_{side}.png" for side in range(2)]
    for name in names:
      Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / name)
    lines.append({"prompt": "a red circle", "images": names, "label_0": number % 2})
  (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def brightness(samples, records):
  """A smooth reward, of images and of plans: their rounding errors stay rounding errors."""
  del records
  return samples.reshape(len(samples), -1).mean(axis=1)


def soft_brightness() -> DeviceReward:
  """The same, on the device."""
  return DeviceReward(
    "soft_brightness",
    {"scale": np.float32(1.0)},
    lambda records: np.zeros(len(records), np.float32),
    lambda params, samples, query: params["scale"] * samples.mean((1, 2, 3)) + query,
  )


def environment(cache, devices=1, compiled=shipped.QUICKLY):
  """For a process with some virtual CPU devices; `compiled` are XLA's flags, "" its defaults."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {compiled}",
    # Virtual devices that wait for each other must not use up the threads of a small machine.
    "PJRT_NPROC": "32",
  }


def case_flags(name, workdir, model, *flags):
  """Flags of the main command for a run of a case in seconds; `flags` come last."""
  config, flags_of_case = CASES[name]
  pairs = pathlib.Path(model).parent / "pairs.jsonl"
  judged = ("--config.evaluation.rewards=('device_jobs:brightness',)",)
  if any("evaluation.rewards" in flag for flag in flags_of_case):  # a second flag would add to it
    judged = ()
  return (
    f"--config={ROOT}/configs/{config}",
    f"--workdir={workdir}",
    f"--config.model.path={model}",
    "--config.num_iterations=3",
    "--config.samples.every=100",
    "--config.samples.num_samples=8",
    "--config.evaluation.num_samples=8",
    "--config.evaluation.microbatch=8",
    *judged,
    "--config.checkpoint.every=2",
    "--config.checkpoint.keep=10",
    *(flag.format(pairs=pairs) for flag in flags_of_case),
    *flags,
  )


def start(flags, cache, *, devices=1, compiled=shipped.QUICKLY):
  """The main command in a process of its own."""
  return subprocess.Popen(
    [sys.executable, "-m", "jaxalign.main", *flags],
    env=environment(cache, devices, compiled),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, timeout=400):
  """What a process that succeeded has printed."""
  printed, _ = process.communicate(timeout=timeout)
  assert process.returncode == 0, f"status {process.returncode}: {printed}"
  return printed


def printed_by(program, cache):
  """The JSON that a program of tests/ prints last, run on eight virtual devices."""
  job = subprocess.run(
    [sys.executable, ROOT / "tests" / f"{program}.py"],
    env=environment(cache, devices=8),
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert job.returncode == 0, job.stderr
  return json.loads(job.stdout.splitlines()[-1])


def records(workdir):
  """The metrics of a run that do not depend on the clock."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: line[name] for name in line if name not in TIMING} for line in lines]


def assert_close(found, expected, tolerance):
  """Every metric of every iteration, relative to its size or to 1, whichever is larger."""
  assert [record["step"] for record in found] == [record["step"] for record in expected]
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.keys() == theirs.keys()
    known = {name for name, value in theirs.items() if value is not None}
    assert known == {name for name, value in ours.items() if value is not None}
    for name in known - SIGNS:
      np.testing.assert_allclose(
        ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=f"{name} {theirs['step']}"
      )
