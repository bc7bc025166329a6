"""What `make_system` holds while it loads a model, in a process of its own."""

import pathlib
import subprocess
import sys

import device_jobs
import jax
import numpy as np
import pytest

from jaxalign.models.families import stable_diffusion

# On a CPU the parameters on the device lie in the same memory, so 1.0 is the least there can be.
LIMIT = 1.3

PROGRAM = """
import pathlib, sys
import jax
from jaxalign import system

def peak():  # resource.getrusage would count what the parent process held when it forked
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split("VmHWM:")[1].split()[0])

def load(path):
  process = {"transition": "ddim", "num_steps": 1, "eta": 0.0}
  return system.make_system(
    seed=0, model={"path": path}, lora=system.NO_LORA, process=process, guidance={"scale": 1.0}
  )

small, large = sys.argv[1:]
load(small)  # imports, and what JAX keeps for itself
before = peak()
loaded = load(large)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.policy.params))
print(size, (peak() - before) / size)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_system_is_loaded_without_a_second_copy_of_its_model(
  small_model, tmp_path, compilation_cache
):
  """A UNet of 308 MB: its arrays are read one by one, straight to where they stay."""
  small = stable_diffusion.load(small_model)
  config = {**small.configs["unet"], "block_out_channels": [384], "layers_per_block": 4}
  large = stable_diffusion.build(
    **{**small.configs, "unet": config}, tokenizer_folder=small.tokenizer_folder
  )
  params = jax.tree.map(  # not zeros, whose pages may take no memory
    lambda leaf: np.full(leaf.shape, 0.1, np.float32), large.networks.param_shapes()
  )
  stable_diffusion.save(large.with_params(params), tmp_path / "large")
  run = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(small_model), str(tmp_path / "large")],
    env=device_jobs.environment(compilation_cache),
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  size, ratio = map(float, run.stdout.split())
  assert size > 200 * 2**20
  assert 0.9 < ratio < LIMIT, ratio
