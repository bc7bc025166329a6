"""`--dry_run`: compiles and times the programs of a run, and leaves nothing behind."""

import time
from typing import Any

import jax

from jaxalign.feeds import Feed
from jaxalign.state import TrainState


def rehearse(feed: Feed, update_fn: Any, state: TrainState, frozen: Any) -> None:
  """Prints memory per device and images per second, measured on one iteration."""
  name, function, args = feed.program(state)
  feed_bytes = _program_bytes(function, *args)
  drawn = jax.block_until_ready(feed.draw(state, 0))  # compiles
  began = time.perf_counter()
  state, data, selections, _ = jax.block_until_ready(feed.draw(state, 0))
  feed_seconds = time.perf_counter() - began

  update_args = (frozen, data, selections[0], 0, 0, 0)
  update_bytes = _program_bytes(update_fn, state, *update_args)
  state, _ = jax.block_until_ready(update_fn(state, *update_args))
  began = time.perf_counter()
  jax.block_until_ready(update_fn(state, *update_args))
  update_seconds = (time.perf_counter() - began) * len(drawn.selections)

  images_per_s = feed.num_images / (feed_seconds + update_seconds)
  print(
    f"memory per device: {name} {feed_bytes / 2**20:.0f} MiB, "
    f"update {update_bytes / 2**20:.0f} MiB\n"
    f"expected: {images_per_s:.1f} images/s with rewards "
    f"({name} {feed_seconds:.1f} s, update {update_seconds:.1f} s an iteration)",
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
