"""Columns in Arrow's formats: parquet, and the files of the `datasets` library; needs pyarrow."""

import itertools
import pathlib
import re
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from jaxalign import checks
from jaxalign.data.readers import contents
from jaxalign.data.readers.table import Row, Table, check_columns

BATCH = 256  # rows that are converted at once
# Arrow's names of types that have no plain value: bytes, times, exact fractions, short floats.
NOT_PLAIN = re.compile("binary|timestamp|date|time|duration|decimal|interval|halffloat|extension")


def import_pyarrow() -> types.ModuleType:
  """pyarrow, with its parts that know files; ValueError saying how to install it."""
  try:
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError(
      f'parquet files need pyarrow, found none ({error}); run: pip install "jaxalign[data]"'
    ) from error
  return pyarrow


def read_parquet(path: pathlib.Path) -> Table:
  """Row by row; of the columns only those that are wanted are read."""
  pyarrow = import_pyarrow()
  file = contents.opened(path)
  try:
    table = pyarrow.parquet.ParquetFile(file)
    _check_counts(table.metadata)
    schema, count = table.schema_arrow, table.metadata.num_rows
  except Exception as error:  # in a broken file pyarrow raises nearly anything
    file.close()
    raise _broken(path, "parquet", error) from error

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row]]:
    with file:
      batches = table.iter_batches(batch_size=BATCH, columns=_chosen(schema, only))
      yield from _rows(path, "parquet", batches)

  return _table(path, rows, schema, count)


def _check_counts(metadata: Any) -> None:
  """Raises ValueError for numbers that contradict each other, which pyarrow would believe."""
  groups = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
  if any(rows < 0 for rows in groups) or sum(groups) != metadata.num_rows:
    raise ValueError(f"expected {metadata.num_rows} rows, found groups of {checks.shown(groups)}")


def read_arrow(path: pathlib.Path) -> Table:
  """A file, or a stream as the `datasets` library saves it."""
  pyarrow = import_pyarrow()
  file = contents.opened(path)
  try:
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    found = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
    schema = found.schema
  except Exception as error:
    file.close()
    raise _broken(path, "Arrow", error) from error

  def rows(only: Collection[str] | None = None) -> Iterator[tuple[int, Row]]:
    with file:
      each = (found.get_batch(k) for k in range(found.num_record_batches)) if is_file else found
      names = _chosen(schema, only)
      batches = (
        batch.select(names).slice(start, BATCH)
        for batch in each
        for start in range(0, batch.num_rows, BATCH)
      )
      yield from _rows(path, "Arrow", batches)

  return _table(path, rows, schema)


def _table(path: pathlib.Path, rows: Any, schema: Any, count: int | None = None) -> Table:
  try:
    check_columns(schema.names)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return Table(rows, tuple(schema.names), count, "row")


def _chosen(schema: Any, only: Collection[str] | None) -> list[str]:
  if only is not None:
    return [name for name in schema.names if name in only]
  return [field.name for field in schema if not NOT_PLAIN.search(str(field.type))]


def _rows(path: pathlib.Path, kind: str, batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
  """(number, the fields that are not null) of every row."""
  found = itertools.chain.from_iterable(_checked(batch).to_pylist() for batch in batches)
  for number in itertools.count(1):
    try:
      row = next(found, None)
    except Exception as error:
      raise _broken(path, kind, error) from error
    if row is None:
      return
    yield number, {name: value for name, value in row.items() if value is not None}


def _checked(batch: Any) -> Any:
  batch.validate(full=True)  # pyarrow trusts what a file says of its places in memory
  return batch


def _broken(path: pathlib.Path, kind: str, error: Exception) -> ValueError:
  fault = checks.cut(checks.first_line(error), 200)
  return ValueError(f"{path} is no whole {kind} file: {fault}")
