"""The rules that say which device holds what."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from device_jobs import environment
from jax.sharding import AbstractMesh, PartitionSpec

from jaxalign.distributed import sharding

MESH = AbstractMesh((2, 4), sharding.AXES)


@pytest.mark.parametrize("shape,spec", [
  ((3, 3, 128, 256), (None, None, None, "fsdp")),
  ((3, 3, 256, 128), (None, None, "fsdp")),
  ((512, 512), ("fsdp",)),  # the first of equals
  ((1023, 512), (None, "fsdp")),  # the largest that four devices divide
  ((1023, 1023), ()),  # none
  ((2**16,), ("fsdp",)),
  ((2**16 - 4,), ()),  # small
  ((), ()),
])
def test_large_arrays_are_cut_along_their_largest_divisible_axis(shape, spec):
  found = sharding.params(jax.ShapeDtypeStruct(shape, np.float32), MESH)
  assert found.spec == PartitionSpec(*spec)


def test_without_fsdp_everything_is_whole():
  mesh = AbstractMesh((8, 1), sharding.AXES)
  found = sharding.params(jax.ShapeDtypeStruct((512, 512), np.float32), mesh)
  assert found.is_fully_replicated


def test_batches_are_cut_over_both_axes():
  assert sharding.batch(MESH).spec == PartitionSpec(("data", "fsdp"))
  assert sharding.batch(MESH, axis=1).spec == PartitionSpec(None, ("data", "fsdp"))
  assert sharding.batch(MESH).shard_shape((16, 3)) == (2, 3)


@pytest.mark.parametrize("data,fsdp", [(-1, 1), (1, -1), (1, 1)])
def test_the_mesh_of_a_single_device(data, fsdp):
  assert dict(sharding.make_mesh(data=data, fsdp=fsdp).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("data,fsdp", [(2, 1), (-1, 2), (-1, -1), (0, -1), (-2, 1), (-1, -4)])
def test_a_mesh_of_another_number_of_devices_is_refused(data, fsdp):
  message = rf"data x fsdp = 1, .* got {data} x {fsdp}\nset one"
  with pytest.raises(ValueError, match=message) as error:
    sharding.make_mesh(data=data, fsdp=fsdp)
  assert len(str(error.value).splitlines()) <= 3


def test_a_batch_that_the_devices_cannot_share_is_refused():
  sharding.check_batch("config.batch.microbatch", 16, MESH)
  with pytest.raises(ValueError, match=r"microbatch: expected a multiple of 8, .* got 12"):
    sharding.check_batch("config.batch.microbatch", 12, MESH)


ON_EIGHT_DEVICES = """
import jax, numpy as np
from jaxalign.distributed import sharding
from jaxalign.models.weights import lazy

mesh = sharding.make_mesh(data=2, fsdp=-1)
assert dict(mesh.shape) == {"data": 2, "fsdp": 4}

# Parameters: the parts of the large array are quarters, and placing twice changes nothing.
tree = {"large": np.arange(2.0**18).reshape(512, 512), "small": np.arange(3.0)}
placed = sharding.place_params(tree, mesh)
assert {part.data.shape for part in placed["large"].addressable_shards} == {(128, 512)}
jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), tree)
again = sharding.place_params(placed, mesh)
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, placed, again)))

# Arrays in a file: of each only the parts of devices are read.
parts_read = []
def part(index):
  parts_read.append(tree["large"][index].shape)
  return tree["large"][index]
opened = {"large": lazy.LazyArray((512, 512), part)}
placed = sharding.place_params(opened, mesh)
np.testing.assert_array_equal(placed["large"], tree["large"])
assert set(parts_read) == {(128, 512)}

# Batches: every row is read once, and comes back from the process that holds it.
rows_read = []
def read(rows):
  rows_read.extend(rows)
  return np.stack([rows, 10 * rows], axis=1)
made = sharding.make_batch(read, 16, (2,), mesh)
assert sorted(rows_read) == list(range(16))
rows, held = sharding.held_rows(made)
np.testing.assert_array_equal(np.asarray(held)[:, 1], 10 * rows)
values = np.stack([np.asarray(held)[:, 0], -rows])
whole = sharding.exchange(values, rows, 16, mesh)
np.testing.assert_array_equal(whole, [np.arange(16), -np.arange(16)])

# In a program: what the devices do not divide is left alone, noise does not depend on them.
@jax.jit
def program(key, x, one):
  x, one = sharding.constrain_batch((x, one), mesh)
  return x, one, sharding.constrain_batch(jax.random.normal(key, (16, 3)), mesh)
x, one, noise = program(jax.random.key(0), np.ones((16, 2)), np.ones((1, 2)))
assert x.sharding.shard_shape(x.shape) == (2, 2) and one.shape == (1, 2)
np.testing.assert_array_equal(noise, jax.random.normal(jax.random.key(0), (16, 3)))
"""

AN_UPDATE = """
import jax, jax.numpy as jnp, numpy as np, optax
from jaxalign import methods
from jaxalign.distributed import sharding
from jaxalign.training import update
from jaxalign.training.state import init_state, jit_end

mesh = sharding.make_mesh(data=2, fsdp=4)
tx = optax.adam(0.1)
params = sharding.place_params({"w": np.ones((512, 512), np.float32)}, mesh)
state = init_state(params, tx, copies=("ema",), mesh=mesh)
def loss(params, frozen, batch, key):
  value = jnp.mean(batch @ params["w"], axis=1)
  return value, {"value": value}
update_fn = update.jit_update(
  methods.Method(loss, methods.Records()), tx, lambda params, base: params, lambda x, rows: x[rows],
  mesh=mesh, state_shardings=sharding.params(state, mesh),
)
before = [(leaf.sharding, leaf) for leaf in jax.tree.leaves(state)]
data, rows = np.ones((16, 512), np.float32), np.arange(16).reshape(2, 8)
state, values = update_fn(state, {"base": {}}, data, rows, 0, 0, 0)
for (placed, old), new in zip(before, jax.tree.leaves(state), strict=True):
  assert new.sharding == placed and old.is_deleted()
before = state
state = jit_end(mesh, sharding.params(state, mesh))(state, {"ema": 0.9})
for placed, new in zip(jax.tree.leaves(sharding.params(state, mesh)), jax.tree.leaves(state)):
  assert new.sharding == placed
parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
assert parts.count((128, 512)) == 4, parts  # the parameters, their average and both moments
assert values["value"].shape == (2, 8) and values["value"].is_fully_replicated
"""


@pytest.mark.parametrize("program", [ON_EIGHT_DEVICES, AN_UPDATE], ids=["arrays", "an update"])
def test_on_eight_devices(compilation_cache, program):
  """Arrays come and go unchanged; an update leaves its state where it was, and donates the old."""
  run = subprocess.run(
    [sys.executable, "-c", program],
    env=environment(compilation_cache, devices=8),
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
