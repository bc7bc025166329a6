"""Reads preferences from files: one row a record, its samples and what was said of them.

  {"prompt": "a red circle", "images": ["a.png", "b.png"], "label_0": 1.0}
  {"record": {"start": [-0.9, 0], "goal": [0.9, 0]}, "samples": ["a.npy", "b.npy"], "label_0": 1.0}

A `.jsonl` file has one such object a line, a `.parquet` file one such row; so have the other
formats of `readers.TABLES`. Columns with other names are told by a map, see `layouts`.

  prompt    text; or record, an object of the fields that the model asks for
  images    list of n paths, relative to the file's folder, bytes of files, or objects of both as
            the `datasets` library stores them, {"bytes": ..., "path": ...}, whose bytes count
            first; or, of any kind of samples, samples
  and one of
  label_0   of two samples: 1 the first is better, 0 the second, 0.5 a tie, or a share of votes
  prob      n lists of n numbers, P(i better than j); null where not compared
  rank      n numbers, 1 the best, ties equal; null where unknown
  binary    n numbers, 1 good, 0 bad, -1 unknown
  scores    n numbers, higher is better; null where unknown

A field that is null is a field not given, in a record too, and other fields are not read. What is
kept in memory is the bytes of the samples that are stored as bytes, and of others the path.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from jaxalign import checks, files
from jaxalign.data import layouts, preferences, readers, sources
from jaxalign.data import records as records_lib
from jaxalign.modalities.modality import Modality, ReadFn

ASKED = ("prompt", "record")
SAMPLES = {"images": "image", "samples": "sample"}  # and what an error calls one of them
LABELS = ("label_0", *preferences.LABELS)
FIELDS = (*ASKED, *SAMPLES, *LABELS)
SHOWN = 3  # bad rows that an error names


@dataclasses.dataclass(frozen=True)
class BadRow:
  """A row that was set aside: its number, from 1, the kind of fault, what it was, and its file."""

  row: int
  reason: str
  detail: str
  file: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the rows of a source."""

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
  source: sources.Source,
  modality: Modality,
  *,
  max_bad_fraction: float = 0.01,
  columns: str | layouts.Columns | None = None,
) -> tuple[tuple[preferences.Record, ...], Report]:
  """Reads and checks every row, decoding each sample once; bad rows are set aside and reported.

  Args:
    source: files, see `sources.find`, in one of the formats of `readers.TABLES`.
    modality: of the samples.
    max_bad_fraction: a larger share of bad rows is an error.
    columns: which columns hold our fields, see `layouts.parse`.

  Raises:
    ValueError: no such file or one that cannot be read, no good row, too many bad ones, or a
      modality whose samples are not read from files.
  """
  if modality.read is None:
    raise ValueError(
      f"preferences: expected a model whose samples can be read from files; those of this one, "
      f"{modality.unit}, have no function for it: Modality.read"
    )
  if not 0 <= max_bad_fraction <= 1:
    raise ValueError(f"max_bad_fraction: expected a share from 0 to 1, got {max_bad_fraction}")
  wanted = layouts.parse(columns)
  for ours in wanted:
    checks.check_choice("config.data.columns: a field of preferences", ours, FIELDS)
  try:
    paths = sources.find(source)
  except sources.NotFoundError as error:
    raise ValueError(
      f"preferences: {error}\nexpected files that end in {readers.accepted(readers.TABLES)}"
    ) from error
  except ValueError as error:
    raise ValueError(f"preferences: {error}") from error
  records, bad = [], []
  for path, number, row in _rows(paths, wanted):
    try:
      records.append(_parse(row, wanted, path.parent, modality.read))
    except _BadRowError as error:
      reason, detail = error.args
      bad.append(BadRow(number, reason, detail, path.name))
  report = Report(sources.shown(source), len(records) + len(bad), tuple(bad))
  _check_share(report, max_bad_fraction, several=len(paths) > 1)
  return tuple(records), report


def _check_share(report: Report, max_bad_fraction: float, *, several: bool) -> None:
  """Raises ValueError if there are no rows, or too many bad ones; it names the first of them."""
  bad = report.bad
  if not report.num_rows:
    raise ValueError(
      f"preferences: {report.source} is empty; expected one row a record and its samples"
    )
  if len(bad) == report.num_rows or len(bad) > max_bad_fraction * report.num_rows:
    first = "; ".join(
      f"{row.file + ' ' if several else ''}row {row.row}: {checks.cut(row.detail, 200)}"
      for row in bad[:SHOWN]
    )
    raise ValueError(
      f"preferences: {report.summary()}\n"
      f"{first}{'; ...' if len(bad) > SHOWN else ''}\n"
      f"mend or remove these rows, or allow more than max_bad_fraction={max_bad_fraction}"
    )


def _rows(
  paths: Iterable[pathlib.Path], wanted: layouts.Columns
) -> Iterator[tuple[pathlib.Path, int, readers.Row | readers.Fault]]:
  """(file, number, row) of all rows; ValueError for a file that cannot be read as a whole."""
  only = {*FIELDS, *layouts.used(wanted)}
  with tqdm.tqdm(unit="row") as bar:
    for path in paths:
      try:
        table = readers.open_table(path, readers.TABLES)
        _check_columns(path, table.columns, wanted)
        bar.set_description(f"reading {path.name}", refresh=False)
        bar.total = None if table.total is None else bar.n + table.total
        for number, row in table.rows(only):
          yield path, number, row
          bar.update()
      except ValueError as error:
        raise ValueError(f"preferences: {error}") from error


def _check_columns(
  path: pathlib.Path, found: tuple[str, ...] | None, wanted: layouts.Columns
) -> None:
  """Raises ValueError if a table of columns cannot hold what is asked for and its samples."""
  if found is None:
    return
  try:
    layouts.check_found(wanted, found)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if not all(set(names) & {*found, *wanted} for names in (ASKED, SAMPLES)):
    raise ValueError(
      f"{path}: expected the columns {_either(ASKED)}, and {_either(SAMPLES)}, found "
      f"{layouts.listed(found)}{layouts.suggestion(found)}\n{layouts.OF_SAMPLES}"
    )


def _either(names: Iterable[str]) -> str:
  return " or ".join(f'"{name}"' for name in names)


def _parse(
  row: readers.Row | readers.Fault, wanted: layouts.Columns, folder: pathlib.Path, read: ReadFn
) -> preferences.Record:
  """Raises `_BadRowError(reason, detail)`."""
  if isinstance(row, readers.Fault):
    raise _BadRowError(row.reason, row.detail)
  try:
    fields = layouts.apply(wanted, row)
  except (TypeError, ValueError) as error:
    raise _BadRowError("bad label", str(error)) from error
  record, (name, found) = _record(fields), _samples(fields)
  labels = _given(fields, LABELS)
  if not labels:
    raise _BadRowError("no label", f"expected one of {', '.join(LABELS)}")
  if len(labels) > 1:
    raise _BadRowError("bad label", f"expected one label, found {' and '.join(labels)}")
  candidates = tuple(_candidate(one, name, folder, read) for one in found)
  try:
    label = _label(labels[0], fields[labels[0]], len(candidates))
    return preferences.Record(record, candidates, **label)
  except (OverflowError, TypeError, ValueError) as error:
    raise _BadRowError("bad label", _in_one_line(error)) from error


def _in_one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _given(fields: dict[str, Any], names: Iterable[str]) -> list[str]:
  return [name for name in names if fields.get(name) is not None]


def _record(fields: dict[str, Any]) -> dict[str, Any]:
  given = _given(fields, ASKED)
  if len(given) > 1:
    raise _BadRowError("bad record", f"expected one of {_either(ASKED)}, found both")
  if given != ["record"]:
    text = fields.get("prompt")
    if not isinstance(text, str) or not text.strip():
      raise _BadRowError(
        "no prompt",
        f'expected a text "prompt", or an object "record"{layouts.suggestion(fields)}',
      )
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


def _samples(fields: dict[str, Any]) -> tuple[str, list[Any]]:
  """The field that holds the samples, and what it holds, one or more."""
  given = _given(fields, SAMPLES)
  if len(given) > 1:
    raise _BadRowError("bad samples", f"expected one of {_either(SAMPLES)}, found both")
  if not given:
    raise _BadRowError(
      "no samples",
      f"expected a list {_either(SAMPLES)} of at least one{layouts.suggestion(fields)}; found the "
      f"fields {layouts.listed(fields)}",
    )
  (name,) = given
  if not isinstance(fields[name], list | tuple) or not fields[name]:
    raise _BadRowError(f"no {name}", f'expected a list "{name}" of at least one')
  return name, list(fields[name])


def _candidate(given: Any, name: str, folder: pathlib.Path, read: ReadFn) -> preferences.Candidate:
  one, source = SAMPLES[name], _source(given, name, folder)
  # Path.is_file raises on a name that is too long.
  if isinstance(source, pathlib.Path) and not os.path.isfile(source):
    raise _BadRowError(f"missing {one}", f'no {one} file "{checks.cut(str(source), 200)}"')
  try:
    return preferences.make_candidate(source, read)
  except ValueError as error:
    raise _BadRowError(f"unreadable {one}", _in_one_line(error)) from error


def _source(given: Any, name: str, folder: pathlib.Path) -> pathlib.Path | bytes:
  """Where a sample is: bytes, a path relative to `folder`, or an object of one of them or both."""
  if isinstance(given, Mapping) and {"bytes", "path"} & given.keys():
    content, path = given.get("bytes"), given.get("path")
    if not (content is None or isinstance(content, bytes)) or not (content or path):
      raise _BadRowError(
        f"no {name}",
        f'expected bytes or a path in {{"bytes", "path"}}, found {checks.shown(content)} and '
        f"{checks.shown(path)}",
      )
    given = content or path
  if isinstance(given, bytes):
    return given
  if not isinstance(given, str):
    raise _BadRowError(f"no {name}", f"expected paths or bytes, found a {type(given).__name__}")
  if "://" in given:
    raise _BadRowError(
      f"no {name}",
      f'expected paths or bytes, found the address "{checks.cut(given, 80)}"; download it first',
    )
  return folder / given


def _label(name: str, values: Any, n: int) -> dict[str, np.ndarray]:
  """{field of a record: the label as float32}; null is NaN."""
  with np.errstate(over="ignore"):  # too large for float32: the inf is refused by the record
    if name != "label_0":
      return {name: np.array(values, np.float32)}
    if n != 2:
      raise ValueError(f"label_0: expected two samples, got {n}")
    p = float(values)
    return {"prob": np.array([[np.nan, p], [1 - p, np.nan]], np.float32)}
