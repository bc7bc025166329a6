"""Sets of records, such as `{"prompt": str, "category": str}`, and which of them a step uses."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from jaxalign import streams
from jaxalign.data import layouts, readers, sources
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


def load(source: sources.Source, columns: str | layouts.Columns | None = None) -> RecordSet:
  """Reads a set of records.

  Args:
    source: one of `NAMED`, where shapes/held_out is validation and test together; or files, see
      `sources.find`: `.txt` with one text a line, which becomes the field "prompt", or rows in one
      of the formats of `readers.TABLES`, whose other fields are kept.
    columns: which columns hold what, see `layouts.parse`. A "prompt" that no map names and that has
      another name is found by `layouts.text_column`.

  Raises:
    ValueError: no such set or file, one that cannot be read, no records, or a row that is none.
  """
  if isinstance(source, str) and source in NAMED:
    return _named(*source.split("/"))
  wanted = {
    ours: theirs for ours, theirs in layouts.parse(columns).items() if ours not in layouts.JUDGED
  }
  try:
    records = tuple(record for path in sources.find(source) for record in _read(path, wanted))
  except sources.NotFoundError as error:
    raise ValueError(
      f"records: {error}\nexpected one of {', '.join(NAMED)}, or files that end in "
      f"{readers.accepted(readers.READERS)}"
    ) from error
  except ValueError as error:
    raise ValueError(f"records: {error}") from error
  if not records:
    raise ValueError(f"records: {sources.shown(source)} holds none; expected one a line or row")
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


def _read(path: pathlib.Path, wanted: layouts.Columns) -> Iterator[Record]:
  """The records of a file; ValueError, which names the line or row, for the first bad one."""
  table = readers.open_table(path, readers.READERS)
  of_table = table.columns is not None
  try:
    if table.columns is not None:
      wanted = _with_text(wanted, table.columns)
      layouts.check_found(wanted, table.columns)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  for number, row in table.rows(None):
    try:
      if isinstance(row, readers.Fault):
        raise ValueError(row.detail)
      found = wanted if of_table else _with_text(wanted, row)
      record = _record(row, found, of_table=of_table)
      check(record)
    except ValueError as error:
      raise ValueError(f"{path} {table.unit} {number}: {error}") from error
    yield record


def _with_text(wanted: layouts.Columns, names: Collection[str]) -> layouts.Columns:
  """The map, and in it which of the columns of a file is the text, if any."""
  found = None if "prompt" in wanted else layouts.text_column(names)
  return wanted if found is None else {"prompt": found, **wanted}


def _record(row: readers.Row, wanted: layouts.Columns, *, of_table: bool) -> Record:
  """The row by our names. In a table of columns, an empty cell is a field that is not given."""
  if not of_table:
    layouts.check_found(wanted, row)
  record = layouts.apply(wanted, row)
  if of_table:
    record = {name: value for name, value in record.items() if not _is_empty(value)}
  if "prompt" in wanted:
    return {"prompt": None, **record}  # which is refused, where it has to be
  if record and not any(isinstance(value, list | dict) for value in record.values()):
    raise ValueError(f'expected a column "prompt", found {layouts.listed(row)}\n{layouts.OF_TEXTS}')
  return record


def _is_empty(value: Any) -> bool:
  return value is None or value != value  # NaN is how pandas writes nothing


def check(record: Record) -> None:
  """Raises ValueError if a text or a category is none; a model asks for the fields it needs."""
  text = record.get("prompt", "a text")
  if not isinstance(text, str) or not text.strip():
    raise ValueError('expected "prompt" to be a text, if given')
  if not isinstance(record.get("category", ""), str):
    raise ValueError('expected "category" to be a text, if given')
  try:
    text.encode()
  except UnicodeEncodeError as error:  # JSON may hold half of a pair
    raise ValueError(
      f'expected "prompt" to be Unicode text, found half a character at {error.start}'
    ) from error
