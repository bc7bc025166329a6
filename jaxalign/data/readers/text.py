"""Texts, one a line, which become the field "prompt"."""

import pathlib
import re
from collections.abc import Collection, Iterator

from jaxalign.data.readers import contents
from jaxalign.data.readers.table import Row, Table

# How a list or an object of JSON begins, and a line of one; "[[a fox]]" and "{a|b}" do not.
_JSON = re.compile(r'[\[{]\s*$|\[\s*\{\s*"|\[\s*"[^"]*"\s*[,\]]|\{\s*"')
_JSON_LINE = re.compile(r'\W?\{\s*"[^"]*"\s*:')


def read(path: pathlib.Path) -> Table:
  """Lines that are not blank, without the space around them; ValueError if they are JSON."""
  # Not splitlines(), which also cuts at the separators that Unicode allows inside a text.
  lines = contents.text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
  numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
  lines_of_json = (_JSON_LINE.match(line) for _, line in numbered)
  if (numbered and _JSON.match(numbered[0][1])) or any(lines_of_json):
    raise ValueError(
      f"{path}: expected one text a line, found JSON; let its name end in .json, or in .jsonl "
      "with one object a line"
    )

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row]]:
    del only
    for number, line in numbered:
      yield number, {"prompt": line}

  return Table(rows, ("prompt",), len(numbered))
