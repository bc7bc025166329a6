"""Reads preferences from files: one row a record, its samples and what was said of them.

  {"prompt": "a red circle", "images": ["a.png", "b.png"], "label_0": 1.0}
  {"record": {"start": [-0.9, 0], "goal": [0.9, 0]}, "samples": ["a.npy", "b.npy"], "label_0": 1.0}

A `.jsonl` file has one such object a line, a `.parquet` file one such row:

  prompt    text; or record, an object of the fields that the model asks for
  images    list of n paths, relative to the file's folder; in parquet also of the bytes of n files;
            or, of any kind of samples, samples
  and one of
  label_0   of two samples: 1 the first is better, 0 the second, 0.5 a tie, or a share of votes
  prob      n lists of n numbers, P(i better than j); null where not compared
  rank      n numbers, 1 the best, ties equal; null where unknown
  binary    n numbers, 1 good, 0 bad, -1 unknown
  scores    n numbers, higher is better; null where unknown

A field that is null is a field not given, in a record too, and other fields are not read. What is
kept in memory is the bytes of the samples in parquet, and of others the path.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tqdm

from jaxalign import files
from jaxalign.data import preferences
from jaxalign.data import records as records_lib
from jaxalign.modalities.modality import Modality, ReadFn

ASKED = ("prompt", "record")
SAMPLES = {"images": "image", "samples": "sample"}  # and what an error calls one of them
LABELS = ("label_0", *preferences.LABELS)
SHOWN = 3  # bad rows that an error names


@dataclasses.dataclass(frozen=True)
class BadRow:
  """A row that was set aside: its number, counted from 1, the kind of fault, and what it was."""

  row: int
  reason: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the rows of a file."""

  source: str
  num_rows: int
  bad: tuple[BadRow, ...]

  def counts(self) -> dict[str, int]:
    """{reason: how many rows}, the most frequent first."""
    return dict(collections.Counter(row.reason for row in self.bad).most_common())

  def summary(self) -> str:
    """One line."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts().items())
    bad = f"; {len(self.bad)} set aside: {reasons}" if self.bad else ""
    return f"{self.source}: {self.num_rows - len(self.bad)} of {self.num_rows} rows read{bad}"

  def write(self, file: str | os.PathLike) -> None:
    """Writes the report as JSON, every bad row included."""
    content = {
      "source": self.source,
      "num_rows": self.num_rows,
      "num_records": self.num_rows - len(self.bad),
      "counts": self.counts(),
      "bad": [dataclasses.asdict(row) for row in self.bad],
    }
    files.write_json(file, content)


class _BadRowError(ValueError):
  """Carries the reason of a bad row, and then its detail."""


def load(
  source: str | os.PathLike, modality: Modality, *, max_bad_fraction: float = 0.01
) -> tuple[tuple[preferences.Record, ...], Report]:
  """Reads and checks every row, decoding each sample once; bad rows are set aside and reported.

  Raises:
    ValueError: no such file or not of the two kinds, no good row in it, a larger share of bad rows
      than `max_bad_fraction`, or a modality whose samples are not read from files.
  """
  if modality.read is None:
    raise ValueError(
      f"preferences: expected a model whose samples can be read from files; those of this one, "
      f"{modality.unit}, have no function for it: Modality.read"
    )
  if not 0 <= max_bad_fraction <= 1:
    raise ValueError(f"max_bad_fraction: expected a share from 0 to 1, got {max_bad_fraction}")
  path = pathlib.Path(source)
  if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
    raise ValueError(
      f'preferences: expected a .jsonl or .parquet file, found no such file "{source}"'
    )
  records, bad = [], []
  for number, row in _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path):
    try:
      records.append(_parse(row, path.parent, modality.read))
    except _BadRowError as error:
      bad.append(BadRow(number, *error.args))
  report = Report(str(path), len(records) + len(bad), tuple(bad))
  if not report.num_rows:
    raise ValueError(f"preferences: {path} is empty; expected one row a record and its samples")
  if not records or len(bad) > max_bad_fraction * report.num_rows:
    first = "; ".join(f"row {row.row}: {row.detail}" for row in bad[:SHOWN])
    raise ValueError(
      f"preferences: {report.summary()}\n"
      f"{first}{'; ...' if len(bad) > SHOWN else ''}\n"
      f"mend or remove these rows, or allow more than max_bad_fraction={max_bad_fraction}"
    )
  return tuple(records), report


def import_pyarrow() -> types.ModuleType:
  """pyarrow, with its part that knows parquet; ValueError saying how to install it."""
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError(
      f'parquet files need pyarrow, found none ({error}); run: pip install "jaxalign[data]"'
    ) from error
  return pyarrow


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """(line number, line) of the lines that are not blank."""
  # Bytes, so that only "\n" ends a line, and a line that is not UTF-8 is one bad row.
  lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
  numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
  yield from tqdm.tqdm(numbered, desc=f"reading {path.name}", unit="row")


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  pyarrow = import_pyarrow()
  try:
    with pyarrow.parquet.ParquetFile(path) as table:
      found = table.schema_arrow.names
      if not all(set(names) & set(found) for names in (ASKED, SAMPLES)):
        raise ValueError(
          f"preferences: {path}: expected the columns {_either(ASKED)}, and {_either(SAMPLES)}, "
          f"found {', '.join(found)}"
        )
      columns = [name for name in (*ASKED, *SAMPLES, *LABELS) if name in found]
      batches = table.iter_batches(batch_size=256, columns=columns)
      rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
      total = table.metadata.num_rows
      yield from enumerate(tqdm.tqdm(rows, f"reading {path.name}", total, unit="row"), 1)
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"preferences: {path} is no whole parquet file: {error}") from error


def _either(names: Iterable[str]) -> str:
  return " or ".join(f'"{name}"' for name in names)


def _parse(row: bytes | dict[str, Any], folder: pathlib.Path, read: ReadFn) -> preferences.Record:
  """Raises `_BadRowError(reason, detail)`."""
  fields = _parse_json(row) if isinstance(row, bytes) else row
  record, (name, sources) = _record(fields), _sources(fields)
  labels = _given(fields, LABELS)
  if not labels:
    raise _BadRowError("no label", f"expected one of {', '.join(LABELS)}")
  if len(labels) > 1:
    raise _BadRowError("bad label", f"expected one label, found {' and '.join(labels)}")
  candidates = tuple(_candidate(source, name, folder, read) for source in sources)
  try:
    label = _label(labels[0], fields[labels[0]], len(candidates))
    return preferences.Record(record, candidates, **label)
  except (OverflowError, TypeError, ValueError) as error:
    raise _BadRowError("bad label", str(error)) from error


def _parse_json(line: bytes) -> dict[str, Any]:
  try:
    fields = json.loads(line.decode())
  except (RecursionError, ValueError) as error:
    raise _BadRowError("not JSON", f"not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise _BadRowError("not JSON", f"expected a JSON object, found a {type(fields).__name__}")
  return fields


def _given(fields: dict[str, Any], names: Iterable[str]) -> list[str]:
  return [name for name in names if fields.get(name) is not None]


def _record(fields: dict[str, Any]) -> dict[str, Any]:
  given = _given(fields, ASKED)
  if len(given) > 1:
    raise _BadRowError("bad record", f"expected one of {_either(ASKED)}, found both")
  if given != ["record"]:
    text = fields.get("prompt")
    if not isinstance(text, str) or not text.strip():
      raise _BadRowError("no prompt", 'expected a text "prompt", or an object "record"')
    return {"prompt": text}
  if not isinstance(fields["record"], dict):
    found = type(fields["record"]).__name__
    raise _BadRowError("bad record", f'expected an object "record", found a {found}')
  record = {name: value for name, value in fields["record"].items() if value is not None}
  try:
    records_lib.check(record)
  except ValueError as error:
    raise _BadRowError("bad record", f"record: {error}") from error
  return record


def _sources(fields: dict[str, Any]) -> tuple[str, list[Any]]:
  """The field that holds the samples, and what it holds, one or more."""
  given = _given(fields, SAMPLES)
  if len(given) > 1:
    raise _BadRowError("bad samples", f"expected one of {_either(SAMPLES)}, found both")
  if not given:
    raise _BadRowError("no samples", f"expected a list {_either(SAMPLES)} of at least one")
  (name,) = given
  if not isinstance(fields[name], list) or not fields[name]:
    raise _BadRowError(f"no {name}", f'expected a list "{name}" of at least one')
  return name, fields[name]


def _candidate(source: Any, name: str, folder: pathlib.Path, read: ReadFn) -> preferences.Candidate:
  one = SAMPLES[name]
  if not isinstance(source, str | bytes):
    raise _BadRowError(f"no {name}", f"expected paths or bytes, found a {type(source).__name__}")
  # Path.is_file raises on a name that is too long.
  if isinstance(source, str) and not os.path.isfile(folder / source):
    raise _BadRowError(f"missing {one}", f'no {one} file "{folder / source}"')
  try:
    return preferences.make_candidate(folder / source if isinstance(source, str) else source, read)
  except ValueError as error:
    raise _BadRowError(f"unreadable {one}", str(error)) from error


def _label(name: str, values: Any, n: int) -> dict[str, np.ndarray]:
  """{field of a record: the label as float32}; null is NaN."""
  if name != "label_0":
    return {name: np.array(values, np.float32)}
  if n != 2:
    raise ValueError(f"label_0: expected two samples, got {n}")
  p = float(values)
  return {"prob": np.array([[np.nan, p], [1 - p, np.nan]], np.float32)}
