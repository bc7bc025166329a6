"""What a loop carries without changing it, and what it makes of that in every step.

A compiler that moves nothing out of loops, as XLA's for GPUs, casts a float32 weight in each step
where the program says so inside the loop.
"""

import re
from typing import NamedTuple

from jaxalign.aot import hlo
from jaxalign.aot.hlo import Instruction, Program

# Operations whose result is their operand, laid out or stored otherwise.
_MOVES = {
  "bitcast", "copy", "transpose", "reshape", "convert", "opt-barrier", "copy-start", "copy-done",
  "all-gather", "all-gather-start", "all-gather-done", "slice",
}  # fmt: skip
# How arguments of a program end that are arrays of a layer; others are data.
_WEIGHT = re.compile(r"\['(kernel|bias|scale|embedding|a|b)'\]$")


class Cast(NamedTuple):
  """A conversion of a program's argument inside a loop, where it is the same in every step."""

  argument: str
  times: int
  from_dtype: str
  to_dtype: str
  shape: tuple[int, ...]
  source: str


def loops(program: Program) -> list[Instruction]:
  """Every `while`, in the order of their computations."""
  return [
    one for all_of in program.computations.values() for one in all_of.values()
    if one.opcode == "while"
  ]  # fmt: skip


def constants(program: Program, loop: Instruction) -> dict[int, Instruction]:
  """By its place in what a loop carries: each entry that the body hands on as it got it.

  Instructions are the body's `get-tuple-element`s.
  """
  body = loop.called("body")
  assert body is not None
  result = program.root(body)
  instructions = program.computations[body]
  found = {}
  for place, name in enumerate(result.operands):
    one = instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast"):
      one = instructions.get(one.operands[0])
    if (
      one is not None
      and (one.opcode, one.number) == ("get-tuple-element", place)
      and program.operands(one)[0].opcode == "parameter"
    ):
      found[place] = one
  return found


def constant_bytes(program: Program, loop: Instruction) -> int:
  """Bytes that a loop carries without changing them: weights, above all."""
  return sum(hlo.num_bytes(one.type) for one in constants(program, loop).values())


def weight_casts(program: Program) -> list[Cast]:
  """Weights among a program's arguments that are converted to a narrower type inside a loop."""
  found = []
  for run in program.runs:
    for conversion, operand in _conversions(program, run.instruction) if run.loops else ():
      wide, narrow = program.operands(conversion)[0].shapes[0][0], conversion.shapes[0][0]
      if hlo.BYTES[narrow] >= hlo.BYTES[wide]:
        continue
      argument = _argument(program, operand, run.loops)
      if argument is not None and _WEIGHT.search(argument.path):
        shape, source = conversion.shapes[0][1], program.source(conversion)
        found.append(Cast(argument.path, run.times, wide, narrow, shape, source))
  return found


def _conversions(
  program: Program, instruction: Instruction
) -> list[tuple[Instruction, Instruction]]:
  """Each conversion of an operand that is not computed with before: `(convert, operand)`."""
  if instruction.opcode == "convert":
    return [(instruction, program.operands(instruction)[0])]
  found = []
  operands = program.operands(instruction)
  for one in program.inside(instruction) if instruction.opcode == "fusion" else ():
    if one.opcode != "convert" or one.computation != instruction.called("calls"):
      continue
    start = program.operands(one)[0]
    while start.opcode in _MOVES and start.opcode != "convert":
      start = program.operands(start)[0]
    if start.opcode == "parameter":
      found.append((one, operands[start.number]))
  return found


def _argument(
  program: Program, value: Instruction, within: tuple[Instruction, ...]
) -> Instruction | None:
  """The argument of the program that a value in the innermost of some loops is, only moved."""
  while value.opcode in _MOVES or _only_moves(program, value):
    value = program.operands(value)[0]
  if not within:
    is_argument = value.opcode == "parameter" and value.computation == program.entry
    return value if is_argument else None
  if value.opcode != "get-tuple-element" or value.number not in constants(program, within[-1]):
    return None
  carried = program.operands(within[-1])[0]
  if carried.opcode != "tuple":
    return None
  return _argument(program, program.operands(carried)[value.number], within[:-1])


def _only_moves(program: Program, fusion: Instruction) -> bool:
  inside = program.inside(fusion) if fusion.opcode == "fusion" else []
  free = _MOVES | {"parameter", "fusion"}
  return bool(inside) and len(fusion.operands) == 1 and all(one.opcode in free for one in inside)
