"""Reads optimized HLO, the text of a compiled program: what one device runs, and how often.

The grammar is XLA's own and the same on every platform; nothing here knows a model.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
  "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8,
}  # fmt: skip
# What takes no time of its own on a device.
FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
  "while", "conditional", "call", "partition-id", "replica-id", "iota",
}  # fmt: skip
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

Shape = tuple[str, tuple[int, ...]]  # dtype as XLA writes it, and sizes


def shapes_in(text: str) -> list[Shape]:
  """The arrays of a type, which may be a tuple of them."""
  found = re.findall(r"(\w+)\[([\d,]*)\]", text)
  return [(d, tuple(map(int, s.split(","))) if s else ()) for d, s in found if d in BYTES]


def array_bytes(shape: Shape) -> int:
  return BYTES[shape[0]] * math.prod(shape[1])


def num_bytes(text: str) -> int:
  """Of all arrays of a type."""
  return sum(map(array_bytes, shapes_in(text)))


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One line of a program: `name = type opcode(operands), attributes`.

  computation: the one it is in; root: whether it is that one's result.
  number: of a parameter, the index of a get-tuple-element, or an integer constant; -1 for others.
  """

  computation: str
  name: str
  root: bool
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  number: int

  @functools.cached_property
  def shapes(self) -> list[Shape]:
    return shapes_in(self.type)

  def called(self, attribute: str) -> str | None:
    """The computation that an attribute such as `body` names."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else None

  @property
  def target(self) -> str:
    """Of a custom call, the name of what is called; "" for others."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def path(self) -> str:
    """The JAX operations that it comes from, joined by slashes; of an argument, its name."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1].replace("\\'", "'") if found else ""


class Run(NamedTuple):
  """An instruction as executed: how many times in all, and in which loops, outermost first."""

  times: int
  loops: tuple[Instruction, ...]
  instruction: Instruction


class Program:
  """A compiled program.

  Attributes:
    computations: instructions by name, by computation.
    runs: everything that one device executes, in order.
  """

  def __init__(self, text: str, *, unknown_trips: int = 1):
    """Loops whose trip count the text does not state count `unknown_trips` times."""
    self.computations: dict[str, dict[str, Instruction]] = {}
    self._tables: dict[str, dict[int, str]] = {}
    self._unknown_trips = unknown_trips
    self.entry = self._parse(text)
    self.runs = list(self._walk(self.entry, 1, ()))

  def _parse(self, text: str) -> str:
    name = entry = ""
    table: dict[int, str] | None = None
    for line in text.splitlines():
      if line in _TABLES:
        table = self._tables.setdefault(line, {})
      elif table is not None and re.match(r"\d+ ", line):
        number, value = line.split(" ", 1)
        table[int(number)] = value
      elif not line.startswith(" ") and (
        header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
      ):
        table, name = None, header[2]
        self.computations[name] = {}
        entry = name if header[1] else entry
      elif name and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
        self.computations[name][found[2]] = _instruction(name, bool(found[1]), found[2], found[3])
    if not entry:
      raise ValueError("expected the text of a compiled program, found none that has an ENTRY")
    return entry

  def _walk(self, name: str, times: int, loops: tuple[Instruction, ...]) -> Iterator[Run]:
    for instruction in self.computations[name].values():
      if instruction.opcode == "while":
        body = instruction.called("body")
        assert body is not None
        yield from self._walk(body, times * self.trips(instruction), (*loops, instruction))
      elif instruction.opcode == "conditional":  # all branches count: an upper bound
        for branch in self.branches(instruction):
          yield from self._walk(branch, times, loops)
      elif instruction.opcode == "call":
        called = instruction.called("to_apply")
        assert called is not None
        yield from self._walk(called, times, loops)
      else:
        yield Run(times, loops, instruction)

  def trips(self, loop: Instruction) -> int:
    """How often the body of a `while` runs.

    Compilers for TPUs do not say; there it is the bound that the loop's counter is compared with.
    """
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    condition = loop.called("condition")
    assert condition is not None
    bounds = [one.number for one in self.computations[condition].values() if _is_bound(one)]
    return bounds[0] if len(bounds) == 1 else self._unknown_trips

  def branches(self, conditional: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if listed:
      return [name.strip().lstrip("%") for name in listed[1].split(",")]
    two = (conditional.called("true_computation"), conditional.called("false_computation"))
    return [name for name in two if name is not None]

  def operands(self, instruction: Instruction) -> list[Instruction]:
    known = self.computations[instruction.computation]
    return [known[name] for name in instruction.operands if name in known]

  def inside(self, instruction: Instruction) -> list[Instruction]:
    """What a fusion, or an asynchronous start, consists of; nested ones too."""
    called = instruction.called("calls")
    own = list(self.computations.get(called, {}).values()) if called else []
    nested = [deep for one in own if one.opcode == "fusion" for deep in self.inside(one)]
    return own + nested

  def root(self, computation: str) -> Instruction:
    return next(one for one in self.computations[computation].values() if one.root)

  def source(self, instruction: Instruction, package: str = "jaxalign") -> str:
    """The innermost line of a package that it comes from, "file.py:12"; "" if there is none."""
    found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    frame, seen = int(found[1]) if found else 0, set()
    while frame and frame not in seen:
      seen.add(frame)
      place, parent = map(int, re.findall(r"_id=(\d+)", self._tables["StackFrames"][frame]))
      location = self._tables["FileLocations"][place]
      number = re.search(r"file_name_id=(\d+)", location)
      line = re.search(r" line=(\d+)", location)
      file = self._tables["FileNames"][int(number[1])].strip('"') if number else ""
      if f"/{package}/" in file and line:
        return f"{file.rsplit(f'/{package}/', 1)[1]}:{line[1]}"
      frame = parent
    return ""


def _is_bound(instruction: Instruction) -> bool:
  return instruction.opcode == "constant" and instruction.number > 0


def _instruction(computation: str, root: bool, name: str, text: str) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  call = text[end:].strip()
  opcode = call[: call.index("(")]
  close = _closing(call, len(opcode))
  inside, attributes = call[len(opcode) + 1 : close], call[close + 1 :]
  index = re.search(r"\bindex=(\d+)", attributes) if opcode == "get-tuple-element" else None
  is_number = opcode in ("parameter", "constant") and inside.isdecimal()
  number = int(index[1]) if index else int(inside) if is_number else -1
  operands = tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(computation, name, root, text[:end], opcode, operands, attributes, number)


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == "(") - (text[index] == ")")
    if not depth:
      return index
  return len(text)


def users(computation: Mapping[str, Instruction]) -> dict[str, list[Instruction]]:
  """Which instructions of a computation read each of its values."""
  found: dict[str, list[Instruction]] = {}
  for instruction in computation.values():
    for name in instruction.operands:
      found.setdefault(name, []).append(instruction)
  return found
