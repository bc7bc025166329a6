"""Random streams: every use of randomness has a name, and no two uses ever share a stream.

JAX's keys form a tree: `fold_in(key, n)` and `split(key)[n]` are both child n of `key`, and the
same key where `jax_threefry_partitionable` is set, as it is by default. Two keys are equal where
their paths from the seed are. The path of a stream is its name and its integers, and these rules
keep all paths apart, with those of the children that are made of a stream by either function:

- The first step is the checksum of the name, another for every name, and nobody else makes children
  of a bare seed: all keys of the package come from here (`tests/test_streams.py`).
- A name always goes with as many integers as the table says. So no stream lies below another, as
  "a" with 1 would lie below "a" with nothing, where `split` finds the same key.
- What is made of a stream therefore lies below this one alone. Whoever makes it takes `split` or
  `fold_in`, not both on one key, and does not draw from a key that has children.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from jaxalign import checks

if TYPE_CHECKING:  # JAX is imported where it is used: much that draws on the host does without
  import jax

  from jaxalign.types import Array, Key

# The uses of randomness, and the integers that each takes after its name.
NAMES: dict[str, tuple[str, ...]] = {
  # A run.
  "policy": (),  # adapters as they are initialised
  "heads": ("head",),  # as they are initialised
  "records": ("iteration",),
  "rollout": ("iteration", "microbatch"),
  "labels": ("iteration",),
  "transitions": ("iteration",),  # the order in which they are trained
  "pair order": ("epoch",),
  "condition dropout": ("iteration",),
  "encoding": ("iteration", "microbatch"),
  "loss": ("iteration", "update", "slice"),
  # What is sampled and judged outside of training.
  "evaluation": ("part", "microbatch"),
  "evaluation records": ("part",),
  "floor": (),  # of bfloat16, see precision.py
  "bootstrap": (),
  "sample": (),  # the command
  "preference prompts": (),
  "preference images": ("image", "microbatch"),
  "preference labels": (),
  # Models that are fitted from nothing; below a fit's own stream are those of its steps.
  "model": (),
  "scenes": (),
  "scene prompts": (),
  "autoencoder": (),
  "autoencoder batches": ("step",),
  "denoiser": (),
  "denoiser batches": ("step",),
  "warm start": (),
  "warm start batches": ("step",),
  "preferences": (),
  "pair shifts": ("step",),
  # The planning world.
  "planner records": (),
  "demonstrations": (),
  # Benchmarks.
  "benchmark inputs": (),
  "benchmark latents": (),
  "benchmark reward": (),
  "benchmark order": (),
}


def number(name: str) -> np.uint32:
  """What stands for `name` in a program that several streams share, as an argument of it."""
  checks.check_choice("stream", name, NAMES)
  # Python's own hash of a string differs between processes; a checksum does not.
  return np.uint32(zlib.crc32(name.encode()))


def stream(
  seed: "int | Array", name: "str | Array | np.integer", *integers: "int | Array"
) -> "Key":
  """The key of one use of randomness. Pure; all but a `name` that is a text may be traced.

  Args:
    seed: of the run.
    name: one of `NAMES`, or its `number`.
    *integers: as many as `NAMES` says, from 0 up and below 2**32.

  Raises:
    ValueError: an unknown name, or another count of integers than it takes.
  """
  import jax

  if isinstance(name, str):
    _check_integers(name, integers)
    name = number(name)
  key = jax.random.key(seed)
  for integer in (name, *integers):
    key = jax.random.fold_in(key, integer)
  return key


def generator(seed: int, name: str, *integers: int) -> np.random.Generator:
  """As `stream`, for what is drawn on the host."""
  _check_integers(name, integers)
  # As a spawn key, which numpy keeps apart from the seed: of a plain list of integers, zeros at its
  # end would count for nothing.
  path = (int(number(name)), *(int(integer) for integer in integers))
  return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=path))


def generator_of(key: "Key") -> np.random.Generator:
  """What a key decides, drawn on the host."""
  import jax

  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def key_shape() -> "jax.ShapeDtypeStruct":
  """A key for programs of which only the shapes are wanted."""
  import jax

  return jax.eval_shape(lambda: jax.random.key(0))


def _check_integers(name: str, integers: tuple) -> None:
  checks.check_choice("stream", name, NAMES)
  if len(integers) != len(NAMES[name]):
    raise ValueError(
      f"stream {name!r}: expected {', '.join(NAMES[name]) or 'no integers'}, got {len(integers)} "
      "integers"
    )
