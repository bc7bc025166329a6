"""Preferences in memory: a record, its candidate samples, and one label that compares them.

Labels come in four kinds; `to_pairs`, `to_ranking` and `to_binary` turn any of them into what a
method wants, and are the only places that decide what a tie means.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data import records

LABELS = ("prob", "rank", "binary", "scores")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One sample, kept as the file or as the bytes it came in, and decoded when it is wanted.

  Attributes:
    source: path or content of a file.
    shape: of the sample.
    dtype: of its numbers.
  """

  source: pathlib.Path | bytes = dataclasses.field(repr=False)
  shape: tuple[int, ...]
  dtype: np.dtype


def make_candidate(
  source: pathlib.Path | bytes, read: Callable[[pathlib.Path | bytes], np.ndarray]
) -> Candidate:
  """Reads the sample once, to know its shape and that it is whole; ValueError if it is not.

  `read` is that of a `Modality`.
  """
  sample = read(source)
  return Candidate(source, sample.shape, sample.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
  """What was asked for, the `n` candidates that were shown, and exactly one label of them.

  Attributes:
    record: what they were made for, such as `{"prompt": str}`.
    prob: `[n, n]`, P(i better than j) in [0, 1]; 0.5 is a tie, NaN not compared. One of (i, j) and
      (j, i) is enough; the diagonal is not read.
    rank: `[n]`, 1 is best, equal numbers are ties, NaN is unknown; numbers may be left out.
    binary: `[n]`, 1 good, 0 bad, -1 unknown.
    scores: `[n]`, higher is better, NaN is unknown.
  """

  record: Mapping[str, Any]
  candidates: tuple[Candidate, ...]
  prob: np.ndarray | None = None
  rank: np.ndarray | None = None
  binary: np.ndarray | None = None
  scores: np.ndarray | None = None

  def __post_init__(self):
    records.check(self.record)
    if not self.candidates:
      raise ValueError("expected at least one candidate, got none")
    given = [name for name in LABELS if getattr(self, name) is not None]
    if len(given) != 1:
      found = " and ".join(given) or "none"
      raise ValueError(f"expected one label of {', '.join(LABELS)}, got {found}")
    _check_label(given[0], getattr(self, given[0]), len(self.candidates))


def _check_label(name: str, values: np.ndarray, n: int) -> None:
  expected = (n, n) if name == "prob" else (n,)
  if values.shape != expected:
    raise ValueError(
      f"{name}: expected {list(expected)} for {n} candidates, got {list(values.shape)}"
    )
  rules = {
    "prob": (lambda v: np.isnan(v) | ((v >= 0) & (v <= 1)), "numbers from 0 to 1"),
    "rank": (lambda v: np.isnan(v) | ((v >= 1) & (v < np.inf)), "numbers from 1, the best, up"),
    "binary": (lambda v: np.isin(v, (-1, 0, 1)), "1 good, 0 bad or -1 unknown"),
    "scores": (lambda v: ~np.isinf(v), "finite numbers"),
  }
  valid, meaning = rules[name]
  wrong = values[~valid(values)]
  if wrong.size:
    raise ValueError(f"{name}: expected {meaning}, got {wrong[0]}")
  # A share of votes may have been rounded to three digits on either side.
  if name == "prob" and (np.abs(_off_diagonal(values + values.T - 1)) > 2e-3).any():
    raise ValueError("prob: expected prob[i][j] + prob[j][i] to be 1 where both are given")
  known = values >= 0 if name == "binary" else ~np.isnan(values)
  if not (_off_diagonal(known) if name == "prob" else known).any():
    raise ValueError(f"{name}: expected a label of at least one candidate, got only unknown ones")


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
  return matrix[~np.eye(len(matrix), dtype=bool)]


class Pairs(NamedTuple):
  """The `K` comparisons of one record.

  Attributes:
    winner, loser: int32 `[K]`, indices of candidates.
    p: float32 `[K]`, P(winner better than loser), from 0.5, a tie, to 1.
  """

  winner: np.ndarray
  loser: np.ndarray
  p: np.ndarray


def to_pairs(record: Record, ties: str = "drop") -> Pairs:
  """Every comparison that the label makes, winner first.

  Two good or two bad candidates of a `binary` label were not compared, so they are no tie.

  Args:
    ties: "drop" leaves ties out; "half" keeps them with p = 0.5, the first candidate as winner.
  """
  if ties not in ("drop", "half"):
    raise ValueError(f'ties: expected "drop" or "half", got "{ties}"')
  i, j = np.triu_indices(len(record.candidates), k=1)
  p = _probabilities(record)[i, j]
  kept = ~np.isnan(p) if ties == "half" else ~np.isnan(p) & (p != 0.5)
  i, j, p = i[kept], j[kept], p[kept]
  first = p >= 0.5
  return Pairs(
    winner=np.where(first, i, j).astype(np.int32),
    loser=np.where(first, j, i).astype(np.int32),
    p=np.maximum(p, 1 - p).astype(np.float32),
  )


def to_ranking(record: Record) -> np.ndarray:
  """float32 `[n]`: 1 plus the number of better candidates, so ties are equal; NaN is unknown.

  A `prob` label is ranked by the mean of each row, so a cycle is a tie.
  """
  strength = _strength(record)
  better = (strength[None, :] > strength[:, None]).sum(axis=1)
  return np.where(np.isnan(strength), np.nan, 1 + better).astype(np.float32)


def to_binary(record: Record, threshold: float | None = None) -> np.ndarray:
  """int8 `[n]`: 1 good, 0 bad, -1 unknown.

  Args:
    threshold: in the label's own unit, not needed for `binary`. Good are `scores` of at least
      this, a `rank` of at most this, and a mean probability to win of more than this; with `prob`
      exactly this, as 0.5 in a tie of two, is neither good nor bad but unknown.
  """
  if record.binary is not None:
    return record.binary.astype(np.int8)
  if threshold is None:
    raise ValueError("to_binary: expected a threshold, because the label is not binary")
  strength = _strength(record)
  threshold = -threshold if record.rank is not None else threshold
  unknown = np.isnan(strength)
  if record.prob is not None:
    unknown |= strength == threshold
  return np.where(unknown, -1, strength >= threshold).astype(np.int8)


def _probabilities(record: Record) -> np.ndarray:
  """`[n, n]`, P(i better than j) in both halves; NaN where not compared, and on the diagonal."""
  if record.prob is not None:
    p = np.where(np.isnan(record.prob), 1 - record.prob.T, record.prob).astype(np.float64)
  else:
    strength = _strength(record)
    difference = np.sign(strength[:, None] - strength[None, :])
    p = (1 + difference) / 2
    if record.binary is not None:
      p[difference == 0] = np.nan
  np.fill_diagonal(p, np.nan)
  return p


def _strength(record: Record) -> np.ndarray:
  """`[n]`: higher is better, NaN is unknown."""
  if record.scores is not None:
    return record.scores
  if record.rank is not None:
    return -record.rank
  if record.binary is not None:
    return np.where(record.binary < 0, np.nan, record.binary)
  p = _probabilities(record)
  compared = (~np.isnan(p)).sum(axis=1)
  mean = np.nansum(p, axis=1) / np.maximum(compared, 1)
  # Rounded, lest the order of a sum's terms break a tie.
  return np.where(compared > 0, np.round(mean, 6), np.nan)
