"""The least time that a compiled program can take, kernel by kernel: a roofline.

Each kernel takes the larger of its bytes over the memory's bandwidth and its operations over the
peak of products. That has no launches, believes that every product reaches the peak, and knows
nothing of caches: a bound by which two programs can be compared, not a time that was measured.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxalign.aot import collectives, hlo, work
from jaxalign.aot.hlo import Instruction, Program, Run
from jaxalign.aot.topology import Chip

# A product with a side of at most this is an adapter's, or of a few rows: it moves more than it
# computes.
THIN = 32
_MOVES = {
  "copy", "transpose", "reshape", "concatenate", "pad", "slice", "dynamic-slice", "gather",
  "dynamic-update-slice", "reverse", "copy-start",
}  # fmt: skip


class Row(NamedTuple):
  """Kernels of one kind, or of one source line.

  kernels: how many are run; seconds: by the roofline; operations: of their products; num_bytes:
  read and written; cycles: as XLA for TPUs guesses them, 0 elsewhere.
  """

  kernels: int
  seconds: float
  operations: int
  num_bytes: int
  cycles: int

  def plus(self, other: "Row") -> "Row":
    return Row(
      self.kernels + other.kernels,
      self.seconds + other.seconds,
      self.operations + other.operations,
      self.num_bytes + other.num_bytes,
      self.cycles + other.cycles,
    )


NOTHING = Row(0, 0.0, 0, 0, 0)


def total(rows: Mapping[str, Row]) -> Row:
  """All of them together."""
  return functools.reduce(Row.plus, rows.values(), NOTHING)


def is_kernel(run: Run) -> bool:
  """Whether something is started on the device; the ends of asynchronous work are not."""
  opcode = run.instruction.opcode
  return opcode not in hlo.FREE and not opcode.endswith(("-done", "-update"))


def kind(program: Program, instruction: Instruction) -> str:
  """What a kernel does, in a word or two."""
  collective = collectives.collective_kind(program, instruction)
  if collective:
    return "collective"
  target = instruction.target
  if "fmha" in target:
    return "attention, fused"
  ops = [instruction, *program.inside(instruction)]
  codes = {one.opcode for one in ops}
  if "conv" in target.lower() or "convolution" in codes:
    # XLA for TPUs writes products as convolutions over no axis.
    windows = [one for one in ops if re.search(r"dim_labels=\w*\d", one.attributes)]
    return "convolution" if windows else _product_kind(program, ops)
  if "matmul" in target or "gemm" in target or "dot" in codes:
    return _product_kind(program, ops)
  if target:
    return f"call of {target}"
  work_done = codes - hlo.FREE - {"fusion", "broadcast"}
  if "reduce" in work_done or "reduce-window" in work_done:
    return "norms and sums"
  if work_done <= {"convert", *_MOVES}:
    return "casts" if "convert" in work_done else "copies and slices"
  return "elementwise"


def _product_kind(program: Program, instructions: Iterable[Instruction]) -> str:
  sizes = [size for one in instructions if (size := work.product_sizes(program, one))]
  return "product, thin" if sizes and min(map(min, sizes)) <= THIN else "product"


def cost(program: Program, run: Run, chip: Chip) -> Row:
  """Of all executions of a kernel. What crosses devices has its own time, elsewhere."""
  operations = work.operations(program, run.instruction)
  moved = work.traffic(program, run.instruction)
  seconds = max(moved / chip.bandwidth, operations / chip.flops)
  if collectives.collective_kind(program, run.instruction):
    seconds = 0.0
  found = re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes)
  cycles = int(found[1]) if found else 0
  times = run.times
  return Row(times, times * seconds, times * operations, times * moved, times * cycles)


def by_kind(program: Program, runs: Iterable[Run], chip: Chip) -> dict[str, Row]:
  """Kernels by what they do, the longest first."""
  return _table(program, chip, ((kind(program, run.instruction), run) for run in runs))


def by_source(program: Program, runs: Iterable[Run], chip: Chip) -> dict[str, Row]:
  """Kernels by what they do and the line of jaxalign that asks for it, the longest first."""

  def label(run: Run) -> str:
    return f"{kind(program, run.instruction)} {program.source(run.instruction)}".strip()

  return _table(program, chip, ((label(run), run) for run in runs))


def _table(program: Program, chip: Chip, labelled: Iterable[tuple[str, Run]]) -> dict[str, Row]:
  rows: dict[str, Row] = {}
  for label, run in labelled:
    if is_kernel(run):
      rows[label] = rows.get(label, NOTHING).plus(cost(program, run, chip))
  return dict(sorted(rows.items(), key=lambda item: -item[1].seconds))
