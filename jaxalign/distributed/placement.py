"""Where the program that is being traced will run.

A layer chooses its kernel by the devices of the program's mesh, and says there what must lie whole
on each of them. The mesh is JAX's own context, so that traces which are kept belong to one mesh.
Asking the process's default backend instead would be wrong whenever a program is compiled for other
devices: a CPU beside a GPU, or hardware that is only described.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

# Compute capabilities of GPUs by their kind: an abstract mesh keeps the kind alone.
_capabilities: dict[str, tuple[int, int]] = {}


def jit(function: Callable, mesh: Mesh, **kwargs: Any) -> Any:
  """`jax.jit(function, **kwargs)`, traced for `mesh`: what it calls finds the mesh here."""
  device = mesh.devices.flat[0]
  _capabilities[device.device_kind] = _capability(device)

  @functools.wraps(function)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return jax.jit(traced, **kwargs)


def platform() -> str:
  """ "cpu", "gpu" or "tpu": of the mesh in context, or the default backend's without one."""
  device = _mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def compute_capability() -> tuple[int, int]:
  """Of the NVIDIA GPUs of the mesh in context, or of this process's; (0, 0) on other devices."""
  device = _mesh().abstract_device
  if device is not None:
    return _capabilities.get(device.device_kind, (0, 0))
  return _capability(jax.local_devices()[0])


def _capability(device: jax.Device) -> tuple[int, int]:
  found = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
  return (int(found[1]), int(found[2])) if found else (0, 0)


def whole(x: jax.Array) -> jax.Array:
  """`x` on every device: what a parameter that is cut over devices becomes where it is used.

  Said of parameters, it keeps activations cut along their batch. Otherwise XLA follows the
  parameters' cut into the activations, which then cross devices in every layer.
  """
  if _mesh().size <= 1:  # one device, or no mesh at all
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def cut(x: jax.Array) -> jax.Array:
  """`x` `[B, ...]` cut along its first axis over all devices, if they divide it."""
  mesh = _mesh()
  if mesh.size <= 1 or x.shape[0] % mesh.size:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def _mesh() -> AbstractMesh:
  return jax.sharding.get_abstract_mesh()
