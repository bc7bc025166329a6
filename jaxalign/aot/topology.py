"""Devices that are only described: what XLA must know of them to compile for them, and no more.

A GPU is described by a text of XLA's own (`stream_executor.GpuTargetConfigProto`, whose fields come
and go with releases), a TPU by the name of a topology that its library knows. Neither needs a
device or a driver; both need the plugin that brings the compiler.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
  """Facts of one device.

  memory: bytes, all of it.
  bandwidth: bytes/s that programs reach of its memory; flops: operations/s that products reach in
    bfloat16. Both are assumed, a little below what is sold; the roofline rests on them.
  link: bytes/s between devices of a host, and between hosts, of one device, as NCCL counts its
    "bus bandwidth"; assumed. None where nothing is claimed.
  """

  memory: int
  bandwidth: float
  flops: float
  link: tuple[float, float] | None = None


class Topology(NamedTuple):
  """Devices of one kind that are described. `name` is what the user asked for."""

  name: str
  devices: Sequence[jax.Device]
  chip: Chip

  @property
  def is_gpu(self) -> bool:
    return self.devices[0].platform == "gpu"

  @property
  def memory(self) -> int:
    """Bytes of one device."""
    return self.chip.memory


GPUS = {
  "a100": Chip(85100068864, 1.8e12, 250e12, (235e9, 180e9)),
  "h100": Chip(84942979072, 3.0e12, 790e12, (370e9, 340e9)),
  "h200": Chip(151397597184, 4.3e12, 790e12, (370e9, 340e9)),
}
# Bandwidth and operations are those that Google states.
TPUS = {
  "v4": Chip(32 * 2**30, 1.2e12, 275e12),
  "v5e": Chip(16 * 2**30, 0.82e12, 197e12),
  "v5p": Chip(95 * 2**30, 2.77e12, 459e12),
  "v6e": Chip(32 * 2**30, 1.64e12, 918e12),
}
GPUS_A_HOST = 8

_NAMES = {
  "a100": "NVIDIA A100-SXM4-80GB",
  "h100": "NVIDIA H100 80GB HBM3",
  "h200": "NVIDIA H200 141GB HBM3e",
}
_BYTES_A_SECOND = {"a100": 2039040000000, "h100": 3352320000000, "h200": 4800000000000}


def find_devices(name: str) -> Topology:
  """The devices of "8xh100", "64xh200", "a100" (one) or "v5e:2x4", described.

  Raises:
    ValueError: the name is unknown, hosts of eight GPUs cannot hold so many, or the plugin is not
      installed.
  """
  gpu = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)", name)
  if gpu and gpu[2] in GPUS:
    return Topology(name, _gpus(gpu[2], int(gpu[1] or 1)), GPUS[gpu[2]])
  kind, _, shape = name.partition(":")
  if kind in TPUS and re.fullmatch(r"\d+(x\d+)+", shape):
    return Topology(name, _tpus(name), TPUS[kind])
  raise ValueError(
    f"--topology: expected a number of GPUs, such as 8xh100 (known: {', '.join(GPUS)}), or the "
    f"shape of a TPU slice,\nsuch as v5e:2x4 (known: {', '.join(TPUS)}); got {name!r}"
  )


def _gpus(kind: str, count: int) -> Sequence[jax.Device]:
  if count < 1 or (count > GPUS_A_HOST and count % GPUS_A_HOST):
    raise ValueError(
      f"--topology: expected 1 to {GPUS_A_HOST} GPUs, or whole hosts of {GPUS_A_HOST}, such as "
      f"{max(1, count // GPUS_A_HOST) * GPUS_A_HOST}x{kind}; got {count}"
    )
  hosts, each = max(1, count // GPUS_A_HOST), min(count, GPUS_A_HOST)
  try:
    return topologies.get_topology_desc(
      platform="cuda",
      target_config=_target(kind),
      topology=f"1x{hosts}x{each}",  # slices x hosts x devices of a host
    ).devices
  except (NotImplementedError, RuntimeError) as error:
    raise _missing("aot-gpu", error) from None


def _tpus(name: str) -> Sequence[jax.Device]:
  # Without it the library asks the network what machine this is, for a minute.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except (NotImplementedError, RuntimeError) as error:
    if "not installed" not in str(error) and "libtpu" not in str(error):
      raise ValueError(f"--topology: {name!r} is no TPU slice that can be had: {error}") from None
    raise _missing("aot-tpu", error) from None


def _missing(extra: str, error: Exception) -> ValueError:
  reason = str(error).strip().splitlines()[0]
  return ValueError(
    f"--topology: expected JAX's compiler for these devices, found none ({reason})\n"
    f'pip install "jaxalign[{extra}]"; it needs Linux, and no device'
  )


# Units of a multiprocessor by XLA's number of their type: operations a clock, and for scalar types
# units too.
_SCALAR = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
_FULL_RATE = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36)
_MATRIX = {**dict.fromkeys(_FULL_RATE, 1024), 10: 512, 11: 256, 12: 32, 16: 512}


def _target(kind: str) -> str:
  """XLA's description of a GPU, as a text protocol buffer."""
  hopper = kind != "a100"
  shared, shared_optin = (233472, 232448) if hopper else (167936, 166912)
  capability = "major: 9 feature_extension: ACCELERATED_FEATURES" if hopper else "major: 8"
  return f"""gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
    threads_per_core_limit: 2048 core_count: {132 if hopper else 108}
    fpus_per_core: {128 if hopper else 64} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
    thread_dim_limit_z: 64 memory_bandwidth: {_BYTES_A_SECOND[kind]}
    device_memory_size: {GPUS[kind].memory} l2_cache_size: {52428800 if hopper else 41943040}
    clock_rate_ghz: {1.98 if hopper else 1.41} registers_per_core_limit: 65536
    registers_per_block_limit: 65536 cuda_compute_capability {{ {capability} }}
    dnn_version: "9.10.0" name: "{_NAMES[kind]}" {_hopper_units() if hopper else ""}
  }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
  device_description_str: "{_NAMES[kind]}" """


def _hopper_units() -> str:
  def rate(key, clock, units, operations):
    return (
      f"rate_infos {{ key: {key} value {{ clock_rate_ghz: {clock} units_per_core: {units} "
      f"ops_per_clock: {operations} }} }}"
    )

  scalar = " ".join(rate(key, 1.98, *numbers) for key, numbers in _SCALAR.items())
  matrix = " ".join(rate(key, 1.98 if key == 12 else 1.83, 4, n) for key, n in _MATRIX.items())
  return (
    f"scalar_unit_description {{ {scalar} }} matrix_unit_description {{ {matrix} }} "
    "device_interconnect_info { active_links: 18 } driver_version: '13.0.0' "
    "runtime_version: '13.0.0' compile_time_toolkit_version: '13.0.0'"
  )


@contextlib.contextmanager
def answering_for(topology: Topology) -> Iterator[None]:
  """While it lasts, JAX's questions about the local GPU are answered for the described one.

  To trace attention for cuDNN, JAX asks this process's GPU for its compute capability and this
  machine's cuDNN for its version, whatever the program is for; without a GPU it refuses. Replaced
  are `check_compute_capability`, `is_cuda_compute_capability_equal` and `check_cudnn_version` of
  `jax._src.cudnn.fused_attention_stablehlo`, which JAX has no public way to answer, and put back
  afterwards. On TPUs nothing is asked, and nothing replaced.
  """
  if not topology.is_gpu:
    yield
    return
  from jax._src.cudnn import fused_attention_stablehlo as asking

  own = _version(topology.devices[0].compute_capability)
  answers: dict[str, Any] = {
    "check_compute_capability": lambda capability: own >= _version(capability),
    "is_cuda_compute_capability_equal": lambda capability: own == _version(capability),
    "check_cudnn_version": lambda: 91000,  # as the description says, 9.10.0
  }
  kept = {name: getattr(asking, name) for name in answers}
  for name, answer in answers.items():
    setattr(asking, name, answer)
  try:
    yield
  finally:
    for name, function in kept.items():
      setattr(asking, name, function)


def _version(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split("."))
