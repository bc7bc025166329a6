"""No two uses of randomness share a stream, in JAX or in numpy."""

import ast
import itertools
import pathlib

import jax
import numpy as np
import pytest

from jaxalign import streams

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxalign"
SEED = 7
# As many of each integer as a small run has: iterations, microbatches, slices and the like.
COUNT = 4
# What a user makes of its stream: as many children as a method splits off, and denoising steps.
CHILDREN = 6


def paths():
  """Every (name, integers...) of a small run."""
  for name, integers in streams.NAMES.items():
    for chosen in itertools.product(range(COUNT), repeat=len(integers)):
      yield name, *chosen


def words(keys):
  """The keys' data as a list of tuples."""
  return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()]


def split(keys):
  return jax.vmap(lambda key: jax.random.split(key, CHILDREN))(keys).reshape(-1)


def fold(keys):
  fold_all = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(lambda key: fold_all(key, np.arange(CHILDREN)))(keys).reshape(-1)


@pytest.mark.parametrize("first", [split, fold])
@pytest.mark.parametrize("second", [split, fold])
def test_no_key_of_a_small_run_occurs_twice(first, second):
  own = jax.numpy.stack([streams.stream(SEED, *path) for path in paths()])
  bare = jax.random.key(SEED)[None]
  children = first(own)
  found = words(own) + words(children) + words(second(children))
  # What a user's own code may make of the bare seed is apart too.
  found += words(bare) + words(first(bare)) + words(second(first(bare)))
  assert len(own) > 150 and len(found) > 7_000
  assert len(set(found)) == len(found)


def test_the_check_would_see_a_stream_below_another():
  """Why a name takes a fixed count of integers: the child of a stream is the longer path."""
  key = streams.stream(SEED, "rollout", 1, 2)
  longer = streams.stream(SEED, streams.number("rollout"), 1, 2, 3)
  assert words(jax.random.split(key, 4)[3]) == words(longer)


def test_no_generator_of_a_small_run_occurs_twice():
  found = [tuple(streams.generator(SEED, *path).integers(2**63, size=2)) for path in paths()]
  found += [tuple(np.random.default_rng([SEED, i]).integers(2**63, size=2)) for i in range(COUNT)]
  found += [tuple(streams.generator_of(jax.random.key(SEED)).integers(2**63, size=2))]
  assert len(set(found)) == len(found)


@pytest.mark.parametrize("draw", [
  lambda *path: words(streams.stream(*path)),
  lambda *path: streams.generator(*path).integers(2**63),
])
def test_a_pure_function_of_seed_name_and_integers(draw):
  assert draw(1, "encoding", 2, 3) == draw(1, "encoding", 2, 3)
  others = [(2, "encoding", 2, 3), (1, "rollout", 2, 3), (1, "encoding", 3, 2)]
  assert all(draw(*other) != draw(1, "encoding", 2, 3) for other in others)


def test_streams_stay_what_they_are():
  """Runs are continued by later versions: neither a checksum nor the order of steps may change."""
  assert streams.number("rollout") == 0x74A0C58F
  assert words(streams.stream(3, "rollout", 1, 2)) == [(3766063805, 1508738980)]
  assert streams.generator(3, "records", 1).integers(1000, size=3).tolist() == [584, 272, 727]


def test_everything_but_the_name_may_be_traced_and_the_number_of_a_name_too():
  key = words(streams.stream(5, "loss", 1, 2, 3))
  traced = jax.jit(lambda seed, i, j, k: streams.stream(seed, "loss", i, j, k))
  assert words(traced(5, 1, 2, 3)) == key
  numbered = jax.jit(streams.stream)
  assert words(numbered(5, streams.number("loss"), 1, 2, 3)) == key


@pytest.mark.parametrize("draw", [streams.stream, streams.generator])
def test_an_unknown_name_is_an_error_that_lists_them(draw):
  with pytest.raises(ValueError, match=r'one of policy, heads, .*did you mean "rollout"'):
    draw(0, "rolout", 1, 2)


@pytest.mark.parametrize("draw", [streams.stream, streams.generator])
@pytest.mark.parametrize("integers", [(), (1,), (1, 2, 3)])
def test_a_name_takes_the_integers_of_the_table(draw, integers):
  with pytest.raises(ValueError, match=f"expected iteration, microbatch, got {len(integers)}"):
    draw(0, "rollout", *integers)


def test_all_randomness_of_the_package_comes_from_here():
  makers = {"key", "PRNGKey", "default_rng", "seed", "RandomState", "SeedSequence", "Random"}
  found = []
  for path in sorted(PACKAGE.rglob("*.py")):
    if path.name == "streams.py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and node.attr in makers:
        owner = ast.unparse(node.value)
        if owner.split(".")[-1] == "random":
          found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {owner}.{node.attr}")
      imported = isinstance(node, ast.ImportFrom) and (node.module or "").endswith("random")
      if imported or (isinstance(node, ast.Import) and "random" in [a.name for a in node.names]):
        found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
  assert not found, "draw from jaxalign.streams, under a name of its own"


def test_every_name_of_the_table_is_used():
  used = set()
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("streams."):
        used |= {part.value for part in node.args if isinstance(part, ast.Constant)}
  assert used - {0} == set(streams.NAMES)
