"""`--dry_run`: compiles and times the programs of a run, and leaves nothing behind."""

import time
from typing import Any

import jax
import numpy as np

from jaxalign import batching, system, update
from jaxalign.state import TrainState


def rehearse(
  plan: batching.BatchPlan,
  sys: system.System,
  update_fn: Any,
  state: TrainState,
  token_ids: np.ndarray,
) -> None:
  """Prints memory per device and images per second, measured on one microbatch and one update.

  Rewards are left out: they run on the host, beside the rollout.
  """
  rows = np.resize(np.arange(len(token_ids)), plan.microbatch)
  rollout_args = (state.params, sys.frozen, token_ids[rows], 0, 0, 0)
  rollout_bytes = _program_bytes(sys.sample_fn, *rollout_args)
  sampled = jax.block_until_ready(sys.sample_fn(*rollout_args))
  began = time.perf_counter()
  jax.block_until_ready(sys.sample_fn(*rollout_args))
  rollout_seconds = (time.perf_counter() - began) * plan.microbatches

  trajectories = update.collect([(sampled.rollout, sampled.cond)] * plan.microbatches)
  selection = batching.selections(plan, 0, 0)[0]
  advantages = np.zeros(plan.images, np.float32)
  update_args = (sys.frozen, trajectories, advantages, selection, 0, 0, 0)
  update_bytes = _program_bytes(update_fn, state, *update_args)
  state, _ = jax.block_until_ready(update_fn(state, *update_args))
  began = time.perf_counter()
  jax.block_until_ready(update_fn(state, *update_args))
  update_seconds = (time.perf_counter() - began) * plan.updates

  images_per_s = plan.images / (rollout_seconds + update_seconds)
  print(
    f"memory per device: rollout {rollout_bytes / 2**20:.0f} MiB, "
    f"update {update_bytes / 2**20:.0f} MiB\n"
    f"expected: {images_per_s:.1f} images/s without rewards "
    f"(rollout {rollout_seconds:.1f} s, update {update_seconds:.1f} s an iteration)",
    flush=True,
  )


def _program_bytes(jitted: Any, *args: Any) -> int:
  """Arguments, results and temporaries of the compiled program on one device."""
  memory = jitted.lower(*args).compile().memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
