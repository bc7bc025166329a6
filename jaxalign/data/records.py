"""Sets of records, such as `{"prompt": str, "category": str}`, and which of them a step uses."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from jaxalign import streams
from jaxalign.types import Record


@dataclasses.dataclass(frozen=True)
class RecordSet:
  """A list of records whose categories are drawn equally often.

  Attributes:
    records: a record's id is its index.
  """

  records: tuple[Record, ...]

  def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
    """Ids of `count` records, int32; categories balanced to within one.

    Which categories get the one more is random. Within a category records are drawn without
    replacement until it is used up.
    """
    categories: dict[str, list[int]] = {}
    for index, record in enumerate(self.records):
      categories.setdefault(record.get("category", ""), []).append(index)
    names = rng.permutation(list(categories))
    decks = {name: _endless(rng, ids) for name, ids in categories.items()}
    order = rng.permutation(count) % len(names)
    return np.array([next(decks[names[which]]) for which in order], np.int32)

  def draw_for_step(self, seed: int, step: int, count: int) -> np.ndarray:
    """`draw` as a pure function of the seed and the step, so that a resumed run sees the same."""
    return self.draw(streams.generator(seed, "records", step), count)

  def __getitem__(self, ids: np.ndarray) -> list[Record]:
    return [self.records[int(index)] for index in ids]

  def __len__(self) -> int:
    return len(self.records)


def _endless(rng: np.random.Generator, ids: list[int]):
  while True:
    yield from rng.permutation(ids)


# Sets that are not files: of each world, what it is trained and judged on.
WORLDS = {
  "shapes": ("train", "held_out", "validation", "test"),
  "planner": ("train", "validation", "test"),
  "gaussian": ("train", "validation", "test"),
}
NAMED = tuple(f"{world}/{part}" for world, parts in WORLDS.items() for part in parts)
VALIDATION_SHARE = 3  # one record of so many


def split(records: RecordSet) -> tuple[RecordSet, RecordSet]:
  """(validation, test): about a third and two thirds of a set.

  A checksum of its content decides where a record belongs. So it never changes sides, whatever is
  added to the file or taken from it, and texts that differ in case or spacing stay together.

  Raises ValueError if one side is empty.
  """
  sides: tuple[list[Record], list[Record]] = ([], [])
  for record in records.records:
    number = int.from_bytes(hashlib.sha256(identity(record).encode()).digest()[:8])
    sides[0 if number % VALIDATION_SHARE == 0 else 1].append(record)
  if not all(sides):
    raise ValueError(
      f"records: expected enough to split into validation and test, found {len(records)}, which "
      f"give {len(sides[0])} and {len(sides[1])}\nadd some, or name files of your own: "
      "config.evaluation.validation, and source for the test"
    )
  return RecordSet(tuple(sides[0])), RecordSet(tuple(sides[1]))


def identity(record: Record) -> str:
  """What makes two records the same one: their text, or without one all that they hold."""
  if "prompt" in record:
    return " ".join(record["prompt"].lower().split())
  return json.dumps(record, sort_keys=True)


def load(source: str) -> RecordSet:
  """Reads a set of records.

  Args:
    source: one of `NAMED`, where shapes/held_out is validation and test together; or a file: `.txt`
      with one text a line, which becomes the field "prompt", or `.jsonl` with one object a line.

  Raises:
    ValueError: no such set or file, not UTF-8, empty, or a line that is no object.
  """
  if source in NAMED:
    return _named(*source.split("/"))
  path = pathlib.Path(source)
  if not path.is_file():
    raise ValueError(
      f"records: expected {', '.join(NAMED)} or a .txt or .jsonl file; found no file "
      f'"{source}"'
    )
  try:
    # Not splitlines(), which also cuts at the separators that Unicode allows inside a text.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"records: {path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t utf-8"
    ) from error
  parse = _parse_json if path.suffix == ".jsonl" else _parse_text
  records = tuple(parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
  if not records:
    raise ValueError(f"records: {path} holds none; expected one a line")
  return RecordSet(records)


def _named(world: str, part: str) -> RecordSet:
  if world == "shapes":
    from jaxalign.worlds import shapes

    return RecordSet(shapes.records(part))
  if world == "planner":
    from jaxalign.worlds import planner

    return RecordSet(planner.records(part))
  from jaxalign.worlds import gaussian

  return RecordSet(gaussian.records(part))


def _parse_text(path: pathlib.Path, number: int, line: str) -> Record:
  del path, number
  return {"prompt": line.strip()}


def _parse_json(path: pathlib.Path, number: int, line: str) -> Record:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"records: {path} line {number} is not JSON: {error.msg}") from error
  if not isinstance(record, dict):
    raise ValueError(f"records: {path} line {number}: expected an object, found {line.strip()!r}")
  try:
    check(record)
  except ValueError as error:
    raise ValueError(f"records: {path} line {number}: {error}") from error
  return record


def check(record: Record) -> None:
  """Raises ValueError if a text or a category is none; a model asks for the fields it needs."""
  text = record.get("prompt", "a text")
  if not isinstance(text, str) or not text.strip():
    raise ValueError('expected "prompt" to be a text, if given')
  if not isinstance(record.get("category", ""), str):
    raise ValueError('expected "category" to be a text, if given')
