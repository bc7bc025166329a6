"""Which device holds what: one mesh, one rule for parameters and one for batches.

The mesh has two axes. Batches are cut over both; large parameters, and what the optimizer keeps of
them, over `fsdp` only. Programs say nothing of devices but where their batches and their results
lie, and XLA adds the communication. A single device is a mesh of one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxalign.types import Array

AXES = ("data", "fsdp")
# Smaller arrays are whole on every device: fetching a part costs more than its memory.
MIN_ELEMENTS = 2**16


def make_mesh(*, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of all devices of all processes, or of the given ones.

  Args:
    data: devices (or groups of them) that hold the parameters whole and share each batch.
    fsdp: devices in such a group, which share the parameters too. One of both may be -1, for the
      devices that the other leaves.
    devices: may be described only (`is_described`).

  Raises:
    ValueError: `data * fsdp` is not the number of devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  sizes = [data, fsdp]
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = count // max(1, -math.prod(sizes))
  if min(sizes) < 1 or math.prod(sizes) != count:
    raise ValueError(
      f"config.mesh: expected data x fsdp = {count}, the number of devices, got {data} x {fsdp}\n"
      "set one of them to -1, which is what the other leaves"
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def one_device() -> Mesh:
  """The mesh of programs that were given none: the first device of this process."""
  return Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), AXES)


def is_described(mesh: Mesh) -> bool:
  """Whether its devices are a description to compile for, and hold nothing."""
  device = mesh.devices.flat[0]
  try:
    return device not in jax.devices(device.platform)
  except RuntimeError:  # this process has no such backend
    return True


def shaped(tree: Any, shardings: Any) -> Any:
  """The shapes of arrays (or shapes) that lie as `shardings`, of leaves or subtrees, says."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    jax.tree.broadcast(shardings, tree),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Cut over all devices along `axis`, which counts examples."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def params(tree: Any, mesh: Mesh) -> Any:
  """The shardings of a tree of arrays or shapes: parameters, or a state that holds them.

  An array of at least `MIN_ELEMENTS` is cut over `fsdp` along its largest axis that `fsdp` divides
  (the first of equals). The rule sees shapes only, so moments lie where their parameters do.
  """
  fsdp = mesh.shape["fsdp"]

  def sharding(leaf) -> NamedSharding:
    axes = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
    # A small array costs more to gather in every layer than to keep whole.
    if math.prod(leaf.shape) < MIN_ELEMENTS or not axes:
      return replicated(mesh)
    axis = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

  return jax.tree.map(sharding, tree)


def place_params(tree: Any, mesh: Mesh, dtypes: Any = None) -> Any:
  """Puts arrays that every process has onto the mesh, each part on its device only.

  `dtypes` is a tree of what they are stored in there; None stores them as they are.

  Of arrays that lie in a file only those parts are read, one array after another. On devices that
  are only described nothing is read, and the result are shapes.
  """
  shardings = params(tree, mesh)
  if dtypes is None:
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, tree)
  if is_described(mesh):  # there is nothing to put anything on
    stored = jax.tree.map(lambda leaf, t: jax.ShapeDtypeStruct(leaf.shape, t), tree, dtypes)
    return shaped(stored, shardings)

  def place(leaf, sharding, dtype):
    if isinstance(leaf, jax.Array):  # another component of the model may have put it there
      if leaf.sharding == sharding and leaf.dtype == dtype:
        return leaf
      leaf = np.asarray(leaf)

    # Asked for by each device: of an array in a file no more than its own part is ever read.
    def part(index):
      return np.asarray(leaf[index]).astype(dtype, copy=False)

    return jax.make_array_from_callback(leaf.shape, sharding, part)

  return jax.tree.map(place, tree, shardings, dtypes)


def constrain_batch(tree: Any, mesh: Mesh) -> Any:
  """Inside a program: cuts every leaf `[B, ...]` along its first axis.

  Leaves whose first axis the devices do not divide, like the one row of the empty prompt, are left
  to XLA.
  """
  sharding = batch(mesh)

  def constrain(leaf):
    # An uneven cut would pad, and the padding would be computed with.
    cut = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
    return jax.lax.with_sharding_constraint(leaf, sharding) if cut else leaf

  return jax.tree.map(constrain, tree)


def constrain_params(tree: Any, mesh: Mesh) -> Any:
  """Inside a program: lays gradients out as `place_params` does their parameters."""
  return jax.lax.with_sharding_constraint(tree, params(tree, mesh))


def pick_own_rows(
  pick: Callable, stacked: Any, axes: Any, examples: Array, *others: Any
) -> Any:
  """Inside a program: examples of stacked microbatches, each taken by the device that holds it.

  An index into an array that is cut over devices would make each of them write a whole batch, of
  zeros but for its own rows, for a sum over all devices.

  Args:
    pick: `(stacked, (j, row), *others) -> tree of [b, ...]`, from the microbatches j `[b]` and the
      rows in them.
    stacked: J microbatches of m examples, leaves `[..., J, m, ...]`, example k at
      `divmod(k, m)`; cut over all devices along m.
    axes: the axis of m, of all leaves or a tree that starts as `stacked` does.
    examples: `[b]` int. The part of b that a device computes must name examples that it holds.
    others: trees of `[b, ...]`, cut alike.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axis_tree = jax.tree.broadcast(axes, stacked)
  leaf, axis = jax.tree.leaves(stacked)[0], jax.tree.leaves(axis_tree)[0]
  microbatch = leaf.shape[axis]

  # `first` is where a device's part of every microbatch begins; row numbers count from there.
  def pick_rows(first, stacked, examples, *others):
    return pick(stacked, (examples // microbatch, examples % microbatch - first), *others)

  if mesh.size <= 1:
    return pick_rows(0, stacked, examples, *others)

  def on_device(*args):
    # Devices lie along both axes in one row, as batches are cut over them.
    first = jax.lax.axis_index(AXES) * (microbatch // mesh.size)
    return pick_rows(first, *args)

  # Inside, each device sees its own part alone, so an index cannot reach into another's.
  rows = PartitionSpec(AXES)
  cut = jax.tree.map(lambda axis: PartitionSpec(*[None] * axis, AXES), axis_tree)
  in_specs = (cut, rows, *[rows] * len(others))
  return jax.shard_map(on_device, in_specs=in_specs, out_specs=rows)(stacked, examples, *others)


def check_batch(what: str, size: int, mesh: Mesh) -> None:
  """Raises ValueError unless the devices of the mesh can share `size` examples evenly."""
  if size % mesh.size:
    raise ValueError(
      f"{what}: expected a multiple of {mesh.size}, the number of devices, got {size}"
    )


def make_batch(
  read: Callable[[np.ndarray], np.ndarray], size: int, shape: tuple[int, ...], mesh: Mesh
) -> jax.Array:
  """The batch `[size, *shape]` of which `read(rows [b])` gives some rows.

  Each process reads the rows that its devices hold, and no others.
  """

  def part(index):
    return read(np.arange(size)[index[0]])

  return jax.make_array_from_callback((size, *shape), batch(mesh), part)


def held_rows(array: jax.Array) -> tuple[np.ndarray, jax.Array]:
  """Of a batch: the rows `[b]` that this process holds, and an array of them alone.

  It does not wait for the batch to be computed.
  """

  def rows_of(shard):
    return np.arange(len(array))[shard.index[0]]

  # Devices of a host need not be in the order of the rows that they hold.
  shards = sorted(array.addressable_shards, key=lambda shard: rows_of(shard)[0])
  rows = np.concatenate([rows_of(shard) for shard in shards])
  # A mesh of this host's devices alone, so that nothing waits for another host.
  here = Mesh(np.array([shard.device for shard in shards]), ("held",))
  held = jax.make_array_from_single_device_arrays(
    (len(rows), *array.shape[1:]),
    NamedSharding(here, PartitionSpec("held")),
    [shard.data for shard in shards],
  )
  return rows, held


def gather(array: jax.Array) -> np.ndarray:
  """A whole array on the host of every process, all of which must call this."""
  return multihost_utils.process_allgather(array, tiled=True)


def exchange(values: np.ndarray, rows: np.ndarray, size: int, mesh: Mesh) -> np.ndarray:
  """All values `[..., size]` of a batch, from those `[..., b]` of the rows that a process holds.

  All processes must call this, each with the rows that `held_rows` gave it.
  """
  # Each device puts in what its host knows of its rows; the cut array is then gathered.
  whole = np.zeros((*values.shape[:-1], size), values.dtype)
  whole[..., rows] = values
  cut = batch(mesh, axis=values.ndim - 1)
  return gather(jax.make_array_from_callback(whole.shape, cut, lambda index: whole[index]))
