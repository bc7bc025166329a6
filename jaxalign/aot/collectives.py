"""What devices send each other: a compiled program's collectives, by the axis they go along."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxalign.aot import hlo
from jaxalign.aot.hlo import Instruction, Program, Run

OPCODES = (
  "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
  "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip


class Collective(NamedTuple):
  """One of them, as often as it runs.

  num_bytes: what each device holds of it when it is whole: the result of an all-gather, the operand
    of a reduce-scatter, either of the others. Of several arrays that are sent as one, `largest` is
    the largest of them.
  axes: of the mesh, joined by " x ".
  size: devices of a group; within_host: whether they are of one host.
  dtypes: of what is sent.
  """

  kind: str
  times: int
  in_loop: bool
  num_bytes: int
  largest: int
  axes: str
  size: int
  within_host: bool
  dtypes: tuple[str, ...]

  def seconds(self, link: tuple[float, float]) -> float:
    """Of all its runs, at a bandwidth in a host and one between hosts (`Chip.link`).

    As NCCL defines them: a ring sends a reduction twice, everything else once, but for the part
    that a device has already.
    """
    factor = (self.size - 1) / self.size * (2 if self.kind == "all-reduce" else 1)
    if self.kind == "collective-permute":
      factor = 1.0
    return self.times * factor * self.num_bytes / link[0 if self.within_host else 1]


def collective_kind(program: Program, instruction: Instruction) -> str:
  """The opcode of the collective that an instruction is or starts; "" for anything else."""
  if instruction.opcode.endswith("-done") or instruction.opcode.endswith("-update"):
    return ""
  inner = program.inside(instruction) if instruction.opcode == "async-start" else []
  for one in (instruction, *inner):
    opcode = one.opcode.removesuffix("-start")
    if opcode in OPCODES:
      return opcode
  return ""


def find(program: Program, runs: Iterable[Run], mesh: Mesh) -> list[Collective]:
  """The collectives among what a device runs, in order; those of one device are none."""
  found = []
  for run in runs:
    kind = collective_kind(program, run.instruction)
    if not kind:
      continue
    stating = [run.instruction, *program.inside(run.instruction)]
    stating = [one for one in stating if one.opcode.removesuffix("-start") == kind]
    groups = _groups(stating[0].attributes, mesh.size)
    size = max(len(group) for group in groups)
    if size < 2:
      continue
    operands = program.operands(run.instruction)
    sent = [hlo.array_bytes(shape) for one in operands for shape in one.shapes]
    whole = size if kind == "all-gather" else 1
    found.append(
      Collective(
        kind=kind,
        times=run.times,
        in_loop=bool(run.loops),
        num_bytes=sum(sent) * whole,
        largest=max(sent, default=0) * whole,
        axes=_axes(groups, mesh),
        size=2 if kind == "collective-permute" else size,
        within_host=_within_host(groups, mesh),
        dtypes=tuple(sorted({dtype for one in operands for dtype, _ in one.shapes})),
      )
    )
  return found


def _groups(attributes: str, count: int) -> list[tuple[int, ...]]:
  """Devices, by their place in the mesh, that take part together."""
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes)
  if listed:
    return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
  # [2,4]<=[4,2]T(1,0): the numbers so far, reshaped, transposed, reshaped again
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota:
    numbers = _numbers(iota[2], iota[3]).reshape(_ints(iota[1]))
    return [tuple(group) for group in numbers.tolist()]
  # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: along axes of a mesh of these numbers, or of
  # all in order; 'b':(2)2 is a part of an axis
  axes = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}",
    attributes,
  )
  if axes:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
    numbers = _numbers(axes[2] or str(math.prod(sizes.values())), axes[3])
    return _along(numbers, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes[4]))
  if "replica_groups={}" in attributes or "replica_groups" not in attributes:
    return [tuple(range(count))]
  raise ValueError(
    "expected replica groups as XLA writes them in jax 0.10, found "
    + attributes[attributes.index("replica_groups") :][:80]
  )


def _ints(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _numbers(sizes: str, order: str | None) -> np.ndarray:
  """The numbers from 0, reshaped and then transposed, in that order."""
  numbers = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
  return numbers.transpose(_ints(order)).ravel() if order else numbers.ravel()


def _along(
  numbers: np.ndarray, sizes: dict[str, int], chosen: Sequence[tuple[str, str, str]]
) -> list[tuple[int, ...]]:
  """Groups along axes, each with what comes before the part that is meant, and its size, or ""."""
  parts = {name: [(size, False)] for name, size in sizes.items()}
  for name, before, size in chosen:
    outer, own = (int(before), int(size)) if size else (1, sizes[name])
    parts[name] = [(outer, False), (own, True), (sizes[name] // outer // own, False)]
  dims = [part for name in sizes for part in parts[name]]
  order = sorted(range(len(dims)), key=lambda axis: dims[axis][1])  # the chosen ones last
  numbers = numbers.reshape([size for size, _ in dims])
  own = math.prod(size for size, is_chosen in dims if is_chosen)
  return [tuple(group) for group in numbers.transpose(order).reshape(-1, own).tolist()]


def _axes(groups: Sequence[tuple[int, ...]], mesh: Mesh) -> str:
  """The axes along which the devices of some group differ."""
  shape = tuple(mesh.shape.values())
  differing: set[int] = set()
  for group in groups:
    places = np.stack(np.unravel_index(np.array(group), shape))
    differing |= {axis for axis, row in enumerate(places) if len(set(row.tolist())) > 1}
  return " x ".join(name for axis, name in enumerate(mesh.axis_names) if axis in differing)


def _within_host(groups: Sequence[tuple[int, ...]], mesh: Mesh) -> bool:
  hosts = [device.process_index for device in mesh.devices.flat]
  return all(len({hosts[place] for place in group}) == 1 for group in groups)
