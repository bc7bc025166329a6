"""Tables of text with a header: cells between commas (.csv) or tabs (.tsv)."""

import csv
import io
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

from jaxalign import checks
from jaxalign.data.readers import contents
from jaxalign.data.readers.table import Fault, Row, Table, check_columns


def read_csv(path: pathlib.Path) -> Table:
  """Cells between commas; what is between quotes may hold commas and ends of lines."""
  return _table(path, contents.text(path), {"delimiter": ",", "strict": True})


def read_tsv(path: pathlib.Path) -> Table:
  """Cells between tabs; quotes are part of a text where they do not enclose whole cells.

  Excel encloses cells in quotes; the published lists of google-research/parti do not, and hold a
  text that begins with a quoted word.
  """
  text = contents.text(path)
  dialect: dict[str, Any] = {"delimiter": "\t", "strict": True}
  try:
    for _ in csv.reader(io.StringIO(text, newline=""), **dialect):
      pass
  except csv.Error:
    dialect |= {"quoting": csv.QUOTE_NONE}
  return _table(path, text, dialect)


def _table(path: pathlib.Path, text: str, dialect: dict[str, Any]) -> Table:
  lines = _lines(path, text, dialect)
  _, header = next(lines, (0, []))
  names = tuple(name.strip() for name in header)
  try:
    check_columns([name for name in names if name])  # pandas leaves its index without a name
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row | Fault]]:
    for number, cells in lines:
      if len(cells) > len(names):
        yield number, _too_many(len(names), len(cells))
      else:
        row = dict(zip(names, cells, strict=False))
        yield number, {name: cell for name, cell in row.items() if _wanted(name, cell, only)}

  return Table(rows, tuple(filter(None, names)))


def _too_many(expected: int, found: int) -> Fault:
  return Fault(
    "cells",
    f"expected {expected} cells as in the header, found {found}; put a text that holds a "
    "separator into quotes",
  )


def _wanted(name: str, cell: str, only: Collection[str] | None) -> bool:
  """An empty cell is a field that is not given."""
  return bool(name and cell.strip()) and (only is None or name in only)


def _lines(
  path: pathlib.Path, text: str, dialect: dict[str, Any]
) -> Iterator[tuple[int, list[str]]]:
  """(number of its first line, cells) of every row that is not blank."""
  reader, number = csv.reader(io.StringIO(text, newline=""), **dialect), 1
  try:
    for cells in reader:
      if any(cell.strip() for cell in cells):
        yield number, cells
      number = reader.line_num + 1
  except csv.Error as error:
    fault = checks.first_line(error)
    raise ValueError(f"{path}: expected rows of cells, found at line {number}: {fault}") from error
