"""What a reader gives: rows of a file, one by one, with their numbers."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jaxalign import checks


class Fault(NamedTuple):
  """What stands in the place of a row that could not be read: the kind of fault, and what it is."""

  reason: str
  detail: str


Row = Mapping[str, Any]


class Table(NamedTuple):
  """The rows of a file.

  rows: `(only) -> iterator of (number, row or fault)`, to be asked for once. Numbers begin at
    1. `only` names the columns to read, None reads all that hold plain values; formats of lines may
    give the others too.
  columns: their names, of a format that has them; None where each row has fields of its own.
  total: of rows, if it is known before they are read.
  unit: what the numbers count.
  """

  rows: Callable[[Collection[str] | None], Iterator[tuple[int, Row | Fault]]]
  columns: tuple[str, ...] | None = None
  total: int | None = None
  unit: str = "line"


def check_columns(names: Collection[str]) -> None:
  """Raises ValueError if two columns have the same name: which one is meant is not known."""
  repeated = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
  if repeated:
    raise ValueError(f"expected each column once, found several: {checks.first(repeated)}")
