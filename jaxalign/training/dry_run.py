"""`--dry_run`: compiles and times the programs of a run, and leaves nothing behind."""

import os
import time
from typing import Any, NamedTuple

import jax

from jaxalign.training.feeds import Feed
from jaxalign.training.state import TrainState


class Need(NamedTuple):
  """Bytes that a program takes on one device beside what lies there anyway, in its microbatch m:
  `fixed + each * m`.
  """

  fixed: float
  each: float

  def at(self, microbatch: int) -> float:
    return self.fixed + self.each * microbatch


def rehearse(feed: Feed, update_fn: Any, state: TrainState, frozen: Any) -> None:
  """Prints memory per device, the largest microbatch, and samples per second of one iteration."""
  name = feed.program(state, feed.microbatch).name
  drawn = jax.block_until_ready(feed.draw(state, 0))  # compiles
  began = time.perf_counter()
  state, data, selections, _ = jax.block_until_ready(feed.draw(state, 0))
  feed_seconds = time.perf_counter() - began

  def feed_bytes(microbatch):
    program = feed.program(state, microbatch)
    return _program_bytes(program.function, *program.args)

  def update_bytes(microbatch):
    selection = _resized(selections[0], microbatch, feed.microbatch)
    return _program_bytes(update_fn, state, frozen, data, selection, 0, 0, 0)

  needs = {name: _fit(feed_bytes, feed.microbatch), "update": _fit(update_bytes, feed.microbatch)}
  print(describe_memory(needs, feed.microbatch, _resident_bytes(), *device_memory()), flush=True)

  args = (frozen, data, selections[0], 0, 0, 0)
  state, _ = jax.block_until_ready(update_fn(state, *args))
  began = time.perf_counter()
  jax.block_until_ready(update_fn(state, *args))
  update_seconds = (time.perf_counter() - began) * len(drawn.selections)
  per_s = feed.num_samples / (feed_seconds + update_seconds)
  print(
    f"expected: {per_s:.1f} {feed.unit}/s with rewards "
    f"({name} {feed_seconds:.1f} s, update {update_seconds:.1f} s an iteration)",
    flush=True,
  )


def describe_memory(
  needs: dict[str, Need], microbatch: int, resident: float, limit: float, source: str
) -> str:
  """Lines on what the programs take of `limit` bytes, and the largest microbatch, in all devices'
  samples or examples, at which every program fits.
  """
  mib = {name: f"{(resident + need.at(microbatch)) / 2**20:.0f}" for name, need in needs.items()}
  lines = [
    "memory per device: "
    + ", ".join(f"{name} {size} MiB" for name, size in mib.items())
    + f", {resident / 2**20:.0f} MiB of it weights, state and data; of {limit / 2**20:.0f} MiB, "
    + source
  ]
  largest = {
    name: int((limit - resident - need.fixed) // need.each)
    for name, need in needs.items()
    if need.each > 0
  }
  if not largest:
    return "\n".join([*lines, "largest microbatch: not known, as no program grows with it"])
  devices = jax.device_count()
  deciding = min(largest, key=lambda name: largest[name])
  fits = max(0, largest[deciding]) // devices * devices
  lines.append(
    f"largest microbatch: about {fits}, where the {deciding} takes all memory. Extrapolated from "
    f"{microbatch} and {2 * microbatch},\nwithout what other programs, libraries and fragments take"
  )
  return "\n".join(lines)


def device_memory() -> tuple[float, str]:
  """`(bytes, where the number is from)` of one device."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return float(stats["bytes_limit"]), "what JAX may use of the device"
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return total / jax.local_device_count(), "this machine's, as the device states none"


def _resident_bytes() -> float:
  """Of all arrays on the first device; trees that share an array have it once."""
  device = jax.local_devices()[0]
  shards = [shard for array in jax.live_arrays() for shard in array.addressable_shards]
  return float(sum(shard.data.nbytes for shard in shards if shard.device == device))


def _fit(program_bytes: Any, microbatch: int) -> Need:
  """The line through the sizes at one microbatch and at two."""
  one, two = program_bytes(microbatch), program_bytes(2 * microbatch)
  return Need(2.0 * one - two, (two - one) / microbatch)


def _resized(selection: Any, microbatch: int, its: int) -> Any:
  """The shape of a selection of one slice that holds another microbatch."""

  def resize(leaf):
    return jax.ShapeDtypeStruct((1, leaf.shape[1] * microbatch // its), leaf.dtype)

  return jax.tree.map(resize, selection)


def _program_bytes(jitted: Any, *args: Any) -> int:
  """Results and temporaries of the compiled program on one device, without its arguments."""
  memory = jitted.lower(*args).compile().memory_analysis()
  return (
    memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
  )
