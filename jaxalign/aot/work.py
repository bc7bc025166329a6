"""What one instruction of a compiled program costs: bytes of memory traffic, and operations.

Bytes are those of operands and results, but of what is sliced only the slices. Operations are those
of products, 2 a multiplication, as `flops` counts them; everything else counts nothing.
"""

import math
import re

from jaxalign.aot import hlo
from jaxalign.aot.hlo import Instruction, Program

_SLICES = ("slice", "dynamic-slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "transpose", "convert")


def traffic(program: Program, instruction: Instruction) -> int:
  """Bytes that it reads and writes."""
  if instruction.opcode in _SLICES:
    return 2 * hlo.num_bytes(instruction.type)
  if instruction.opcode == "dynamic-update-slice":
    return 2 * hlo.num_bytes(program.operands(instruction)[1].type)
  sizes = [hlo.num_bytes(operand.type) for operand in program.operands(instruction)]
  written = hlo.num_bytes(instruction.type)
  if instruction.opcode == "custom-call" and instruction.shapes:
    written = hlo.array_bytes(instruction.shapes[0])  # the others are workspace
  called = instruction.called("calls")
  if instruction.opcode == "fusion" and called in program.computations:
    for parameter in program.computations[called].values():
      if parameter.opcode == "parameter":
        sizes[parameter.number] = _read(program, parameter)
    root = program.root(called)
    if root.opcode == "dynamic-update-slice":  # in place
      written = hlo.num_bytes(program.operands(root)[1].type)
  return written + sum(sizes)


def _read(program: Program, value: Instruction) -> int:
  """Bytes that a fusion reads of a value in it, by way of views and slices."""
  users = hlo.users(program.computations[value.computation])
  whole = hlo.num_bytes(value.type)

  def read(value: Instruction) -> int:
    total = whole if value.root else 0
    for user in users.get(value.name, ()):
      if user.opcode in _SLICES:
        total += hlo.num_bytes(user.type)
      elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
        continue
      else:
        total += read(user) if user.opcode in _VIEWS else whole
    return min(whole, total)

  return read(value)


def operations(program: Program, instruction: Instruction) -> int:
  """Of the products in it, its fusion included."""
  return sum(_product(program, one) for one in (instruction, *program.inside(instruction)))


def product_sizes(program: Program, instruction: Instruction) -> tuple[int, int, int] | None:
  """`(rows, columns, contracted)` of a matrix product, batches among the rows; None for others."""
  operands = [shape for one in program.operands(instruction) for _, shape in one.shapes]
  contracted = re.search(
    r'(?:lhs_contracting_dims=\{|"lhs_contracting_dimensions":\[)([^}\]]*)', instruction.attributes
  )
  if not (contracted and instruction.shapes and len(operands) > 1):
    return None
  inner = math.prod(operands[0][int(axis)] for axis in re.findall(r"\d+", contracted[1]))
  out = instruction.shapes[0][1]
  columns = out[-1] if out else 1
  return math.prod(out) // max(1, columns), columns, inner


def _product(program: Program, instruction: Instruction) -> int:
  sizes = product_sizes(program, instruction)
  if sizes is not None:
    return 2 * math.prod(sizes)
  operands = [shape for one in program.operands(instruction) for _, shape in one.shapes]
  if len(operands) < 2 or not instruction.shapes:
    return 0
  if "fmha" in instruction.target:
    (batch, length, heads, size), keys = operands[0], operands[1][1]
    # Two products forward; backward one of them again, and two for each of the two.
    products = 5 if "Backward" in instruction.target else 2
    return 2 * products * batch * length * heads * size * keys
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  if not labels:
    return 0
  left, kernel, out = operands[0], operands[1], instruction.shapes[0][1]
  features = labels[2].index("o")
  # cuDNN's gradients keep the labels of the forward convolution.
  if "convBackwardInput" in instruction.target:
    return 2 * math.prod(left) * math.prod(kernel) // kernel[features]
  if "convBackwardFilter" in instruction.target:
    return 2 * math.prod(kernel) * math.prod(out) // out[features]
  groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  batch = out[labels[3].index("b")] // (int(groups[1]) if groups else 1)
  total = 2 * batch * out[labels[3].index("f")] * kernel[labels[2].index("i")]
  return total * _taps(instruction, labels, left, out)


def _taps(instruction: Instruction, labels: re.Match, left, out) -> int:
  """Multiplications of a convolution for each pair of channels and image, zeros of dilation and
  what stands for a batch left out.
  """
  window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(part.split("=") for part in window[1].split()) if window else {}
  count = len(fields["size"].split("x")) if "size" in fields else 0

  def numbers(name: str) -> list[int]:
    return [int(part) for part in fields[name].split("x")] if name in fields else [1] * count

  pads = [part.split("_") for part in fields["pad"].split("x")] if "pad" in fields else []
  total = 1
  steps = zip(
    *map(numbers, ("size", "stride", "lhs_dilate", "rhs_dilate")), strict=True
  )
  for axis, (size, stride, dilated, spread) in enumerate(steps):
    length, places = left[labels[1].index(str(axis))], out[labels[3].index(str(axis))]
    low = int(pads[axis][0]) if pads else 0
    if dilated == spread == 1 and low >= 0:
      total *= size * places  # taps on padding count, as `flops` counts them
      continue
    last = (length - 1) * dilated + 1
    taps = (place * stride + tap * spread - low for tap in range(size) for place in range(places))
    total *= sum(0 <= tap < last and tap % dilated == 0 for tap in taps)
  return total
