"""Reads preferences from files: one row a prompt, its images and what was said of them.

  {"prompt": "a red circle", "images": ["a.png", "b.png"], "label_0": 1.0}

A `.jsonl` file has one such object a line, a `.parquet` file one such row:

  prompt    text
  images    list of n paths, relative to the file's folder; in parquet also of n images' bytes
  and one of
  label_0   of two images: 1 the first is better, 0 the second, 0.5 a tie, or a share of votes
  prob      n lists of n numbers, P(i better than j); null where not compared
  rank      n numbers, 1 the best, ties equal; null where unknown
  binary    n numbers, 1 good, 0 bad, -1 unknown
  scores    n numbers, higher is better; null where unknown

A label that is null is a label not given, and other fields are not read. What is kept in memory is
the bytes of the images in parquet, and of others the path.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from jaxalign import files
from jaxalign.data import preferences
from jaxalign.data.candidates import Candidate, make_candidate

FIELDS = ("prompt", "images", "label_0", *preferences.LABELS)
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
  source: str | os.PathLike, *, max_bad_fraction: float = 0.01
) -> tuple[tuple[preferences.Record, ...], Report]:
  """Reads and checks every row, decoding each image once; bad rows are set aside and reported.

  Raises:
    ValueError: no such file or not of the two kinds, no good row in it, or a larger share of bad
      rows than `max_bad_fraction`.
  """
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
      records.append(_parse(row, path.parent))
    except _BadRowError as error:
      bad.append(BadRow(number, *error.args))
  report = Report(str(path), len(records) + len(bad), tuple(bad))
  if not report.num_rows:
    raise ValueError(f"preferences: {path} is empty; expected one row a prompt and its images")
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
      if not {"prompt", "images"} <= set(found):
        raise ValueError(
          f'preferences: {path}: expected the columns "prompt" and "images", found '
          f"{', '.join(found)}"
        )
      columns = [name for name in FIELDS if name in found]
      batches = table.iter_batches(batch_size=256, columns=columns)
      rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
      total = table.metadata.num_rows
      yield from enumerate(tqdm.tqdm(rows, f"reading {path.name}", total, unit="row"), 1)
  except (pyarrow.ArrowException, OSError) as error:
    raise ValueError(f"preferences: {path} is no whole parquet file: {error}") from error


def _parse(row: bytes | dict[str, Any], folder: pathlib.Path) -> preferences.Record:
  """Raises `_BadRowError(reason, detail)`."""
  fields = _parse_json(row) if isinstance(row, bytes) else row
  prompt, images = fields.get("prompt"), fields.get("images")
  if not isinstance(prompt, str) or not prompt.strip():
    raise _BadRowError("no prompt", 'expected a text "prompt"')
  if not isinstance(images, list) or not images:
    raise _BadRowError("no images", 'expected a list "images" of at least one')
  labels = [name for name in FIELDS[2:] if fields.get(name) is not None]
  if not labels:
    raise _BadRowError("no label", f"expected one of {', '.join(FIELDS[2:])}")
  if len(labels) > 1:
    raise _BadRowError("bad label", f"expected one label, found {' and '.join(labels)}")
  candidates = tuple(_candidate(image, folder) for image in images)
  try:
    label = _label(labels[0], fields[labels[0]], len(candidates))
    return preferences.Record(prompt, candidates, **label)
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


def _candidate(image: Any, folder: pathlib.Path) -> Candidate:
  if not isinstance(image, str | bytes):
    raise _BadRowError("no images", f"expected paths or bytes, found a {type(image).__name__}")
  # Path.is_file raises on a name that is too long.
  if isinstance(image, str) and not os.path.isfile(folder / image):
    raise _BadRowError("missing image", f'no image file "{folder / image}"')
  try:
    return make_candidate(folder / image if isinstance(image, str) else image)
  except ValueError as error:
    raise _BadRowError("unreadable image", str(error)) from error


def _label(name: str, values: Any, n: int) -> dict[str, np.ndarray]:
  """{field of a record: the label as float32}; null is NaN."""
  if name != "label_0":
    return {name: np.array(values, np.float32)}
  if n != 2:
    raise ValueError(f"label_0: expected two images, got {n}")
  p = float(values)
  return {"prob": np.array([[np.nan, p], [1 - p, np.nan]], np.float32)}
