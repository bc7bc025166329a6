"""Readers of data files: a table from suffix to reader. Any other suffix is refused by name."""

import pathlib
from collections.abc import Callable, Mapping

from jaxalign import checks
from jaxalign.data.readers import arrow, contents, delimited, json_files, text
from jaxalign.data.readers.table import Fault, Row, Table

__all__ = ["READERS", "TABLES", "Fault", "Row", "Table", "accepted", "open_table"]

Reader = Callable[[pathlib.Path], Table]

# Rows of fields.
TABLES: Mapping[str, Reader] = {
  ".jsonl": json_files.read_lines,
  ".ndjson": json_files.read_lines,
  ".json": json_files.read,
  ".csv": delimited.read_csv,
  ".tsv": delimited.read_tsv,
  ".parquet": arrow.read_parquet,
  ".arrow": arrow.read_arrow,
  ".feather": arrow.read_arrow,
}
# And what one field is enough for; a file without a suffix may only be text.
READERS: Mapping[str, Reader] = {".txt": text.read, "": text.read, **TABLES}


def accepted(kinds: Mapping[str, Reader]) -> str:
  """The suffixes of a table, and of what they may be packed with, for a message."""
  return f"{', '.join(filter(None, kinds))}, also packed as {', '.join(contents.PACKED)}"


def open_table(path: pathlib.Path, kinds: Mapping[str, Reader]) -> Table:
  """The rows of a file, by its suffix; what is packed is unpacked in memory.

  Raises ValueError for a suffix that is not of `kinds`, a content that contradicts it, a file that
  is broken as a whole, and an absent extra. What is wrong with one row is a `Fault` among the rows.
  """
  suffix, _ = contents.suffixes(path)
  if suffix not in kinds:
    raise ValueError(
      f"expected a file that ends in {accepted(kinds)}; found "
      f'"{checks.cut(str(path), 200)}"{contents.hint(path)}'
    )
  return kinds[suffix](path)
