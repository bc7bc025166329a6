"""Texts, one a line, which become the field "prompt"."""

import pathlib
import re
from collections.abc import Collection, Iterator

from jaxalign.data.readers import contents
from jaxalign.data.readers.table import Row, Table

# How a list or an object begins, or a line of one; weights as in "[a fox]" and "{a|b}" do not.
_JSON = re.compile(r'[\[{]\s*$|\[\s*[\[{"]|\{\s*"')


def read(path: pathlib.Path) -> Table:
  """Lines that are not blank, without the space around them; ValueError if they are JSON."""
  # Not splitlines(), which also cuts at the separators that Unicode allows inside a text.
  lines = contents.text(path).split("\n")
  numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
  if numbered and _JSON.match(numbered[0][1]):
    raise ValueError(
      f"{path}: expected one text a line, found JSON; let its name end in .json, or in .jsonl "
      "with one object a line"
    )

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row]]:
    del only
    for number, line in numbered:
      yield number, {"prompt": line}

  return Table(rows, ("prompt",), len(numbered))
