"""JSON: lines of objects, or one list or object of all rows."""

import json
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

from jaxalign import checks
from jaxalign.data.readers import contents
from jaxalign.data.readers.table import Fault, Row, Table

FORMS = (
  'a list of objects, a list of texts, or an object of one such list, as {"prompt": ["a", "b"]}'
)


def read_lines(path: pathlib.Path) -> Table:
  """One object a line; a line that is none is a fault of its own."""
  # Bytes, so that a line that is not UTF-8 is one fault. No value of JSON holds an end of a line.
  content = contents.read(path).removeprefix(b"\xef\xbb\xbf")
  lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
  numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row | Fault]]:
    del only
    for number, line in numbered:
      yield number, _parse_line(line)

  return Table(rows, total=len(numbered))


def _parse_line(line: bytes) -> Row | Fault:
  try:
    return _object(json.loads(line.decode()))
  except UnicodeDecodeError as error:
    return Fault(
      "not JSON", f"not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t utf-8"
    )
  except (RecursionError, ValueError) as error:
    return Fault("not JSON", f"not JSON: {checks.cut(checks.first_line(error), 200)}")


def _object(found: Any) -> Row | Fault:
  if isinstance(found, dict):
    return found
  return Fault("not JSON", f"expected a JSON object, found a {type(found).__name__}")


def read(path: pathlib.Path) -> Table:
  """All rows in one value, see `FORMS`; or lines of objects, which often have this suffix too."""
  content = contents.text(path)
  try:
    whole = json.loads(content) if content.strip() else []
  except json.JSONDecodeError as error:
    first = content.strip().split("\n", 1)[0]
    if isinstance(_parse_line(first.encode()), dict):
      return read_lines(path)
    raise ValueError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
  except (RecursionError, ValueError) as error:
    raise ValueError(f"{path} is not JSON: {checks.first_line(error)}") from error
  found = _rows(path, whole)

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row | Fault]]:
    del only
    yield from enumerate(found, 1)

  return Table(rows, total=len(found), unit="row")


def _rows(path: pathlib.Path, whole: Any) -> list[Row | Fault]:
  if isinstance(whole, dict):
    return _rows_of_object(path, whole)
  if not isinstance(whole, list):
    raise ValueError(f"{path}: expected {FORMS}; found a {type(whole).__name__}")
  return [{"prompt": one} if isinstance(one, str) else _object(one) for one in whole]


def _rows_of_object(path: pathlib.Path, whole: dict[str, Any]) -> list[Row | Fault]:
  """Of one row, of one list of rows or texts in an object with others, or of columns."""
  lists = {name: value for name, value in whole.items() if isinstance(value, list)}
  only_lists = len(lists) == len(whole) > 0
  numbers = all(isinstance(one, int | float) for value in lists.values() for one in value)
  if isinstance(whole.get("prompt"), str) or isinstance(whole.get("record"), dict):
    return [whole]
  if only_lists and numbers:
    return [whole]
  of_objects = [value for value in lists.values() if value and isinstance(value[0], dict)]
  if len(of_objects) == 1:
    return [_object(one) for one in of_objects[0]]
  if len(lists) == 1:
    (texts,) = lists.values()
    if texts and all(isinstance(one, str) for one in texts):
      return [{"prompt": one} for one in texts]
  if of_objects or not only_lists:
    names = checks.first(map(repr, whole)) or "nothing"
    raise ValueError(f"{path}: expected {FORMS}; found an object of {names}")
  lengths = {name: len(value) for name, value in lists.items()}
  if len(set(lengths.values())) > 1:
    found = checks.first(f"{name!r} of {length}" for name, length in lengths.items())
    raise ValueError(f"{path}: expected columns of one length, found {found}")
  return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
