"""The examples of stored preferences in batches: which of them a step trains on."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxalign import checks, streams
from jaxalign.data import preferences
from jaxalign.data.examples import Examples
from jaxalign.modalities.modality import Modality, ResizeFn
from jaxalign.types import Record


class ExampleSet:
  """The examples of many records.

  Rows, `len` and what `samples` takes count examples; epochs and batches count records. A record is
  what a person was shown and judged, and nine ranked samples, which make 36 pairs, are one of them
  just as two samples are: a step draws records, and of each of them one example.

  Attributes:
    records: of each of the P examples, what it was made for, such as `{"prompt": str}`.
    values: `{name: [P, ...]}`.
    record: int32 `[P]`, from 0 and ascending, which record an example is of. Records without one
      are not counted.
    num_records: how many there are.
    each: the axis of an example's samples: `()`, or `(n,)`.
    shape: of one of the samples that `samples` returns.
    dtype: of their numbers.
  """

  def __init__(
    self,
    records: Sequence[preferences.Record],
    examples: Callable[[preferences.Record], Examples],
    modality: Modality,
    *,
    shape: tuple[int, ...],
    resize: str | bool = False,
  ):
    """Takes every example that `examples` makes of a record.

    Args:
      records: as they were read.
      examples: see `ExamplesFn`.
      modality: of the samples.
      shape: of a sample.
      resize: bring samples to `shape` by the function of that name in `Modality.resize`, of which
        true is the first; false or "": another shape is an error.

    Raises:
      ValueError: no record has an example, or a sample is not of `shape`.
    """
    self.shape, self._modality = tuple(shape), modality
    self._resize = _resize_fn(modality, resize)
    found = [examples(record) for record in records]
    counts = np.array([len(one.candidates) for one in found], np.int32)
    if not counts.sum():
      raise ValueError(
        f"preferences: expected examples to train on; none of {len(records)} records makes one "
        "with config.data as it is"
      )
    self.values = {
      name: np.concatenate([one.values[name] for one in found]) for name in found[0].values
    }
    counts = counts[counts > 0]
    self.num_records = len(counts)
    self.record = np.repeat(np.arange(self.num_records, dtype=np.int32), counts)
    self._counts, self._firsts = counts, np.cumsum(counts) - counts  # of the rows of each record
    self.each = found[0].candidates.shape[1:]
    self.records: list[Record] = []
    self._candidates: list[list[preferences.Candidate]] = []
    for record, one in zip(records, found, strict=True):
      for chosen in one.candidates:
        self.records.append(record.record)
        self._candidates.append([record.candidates[k] for k in np.atleast_1d(chosen)])
    for candidates in self._candidates:
      for candidate in candidates:
        self._check_shape(candidate.shape)
    self.dtype = self._candidates[0][0].dtype

  def __len__(self) -> int:
    return len(self._candidates)

  def draw_for_step(self, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Rows of the examples of a step, int32 `[batch_size]`.

    A pure function of its arguments: each epoch is a new order of all records, without replacement,
    with one example of each, drawn uniformly; the steps cut the row of epochs into batches. So
    every record counts once, and the plain mean of a loss over the batch is the one to minimise.
    """
    if step < 0 or batch_size < 1:
      raise ValueError(f"expected step >= 0 and batch_size >= 1, got {step} and {batch_size}")
    epoch, start = divmod(step * batch_size, self.num_records)
    last_epoch = (step * batch_size + batch_size - 1) // self.num_records
    orders = [self._rows_of_epoch(seed, e) for e in range(epoch, last_epoch + 1)]
    return np.concatenate(orders)[start : start + batch_size].astype(np.int32)

  def _rows_of_epoch(self, seed: int, epoch: int) -> np.ndarray:  # [num_records]
    rng = streams.generator(seed, "pair order", epoch)
    records = rng.permutation(self.num_records)
    return self._firsts[records] + rng.integers(self._counts[records])

  def samples(self, rows: np.ndarray) -> np.ndarray:
    """`[B, *shape]`, or `[B, n, *shape]`, of examples `[B]`, decoded anew at every call."""
    read = [self._read(c.source) for row in rows for c in self._candidates[int(row)]]
    return np.stack(read).reshape(len(rows), *self.each, *self.shape)

  def _read(self, source: pathlib.Path | bytes) -> np.ndarray:
    assert self._modality.read is not None  # candidates were made by it
    sample = self._modality.read(source)
    self._check_shape(sample.shape)  # again, because a file may have changed since it was read
    if self._resize is None or sample.shape == self.shape:
      return sample
    return self._resize(sample, self.shape)

  def _check_shape(self, shape: tuple[int, ...]) -> None:
    if shape != self.shape and self._resize is None:
      ways = " or ".join(f"--config.data.resize={name}" for name in self._modality.resize or ())
      remedy = f"; resize them beforehand, or with {ways}" if ways else ""
      raise ValueError(
        f"preferences: expected {self._modality.unit} of shape {self.shape}, found one of {shape}"
        f"{remedy}"
      )


def _resize_fn(modality: Modality, resize: str | bool) -> ResizeFn | None:
  """The function that `config.data.resize` names, None for none."""
  if not resize:
    return None
  if not modality.resize:
    raise ValueError(
      f"config.data.resize: expected False, because {modality.unit} cannot be resized; got {resize}"
    )
  if resize is True:
    return next(iter(modality.resize.values()))
  if not isinstance(resize, str) or resize not in modality.resize:
    raise ValueError(
      f"config.data.resize: expected False or one of {', '.join(modality.resize)}, got "
      f"{checks.shown(resize)}{checks.closest(str(resize), modality.resize)}"
    )
  return modality.resize[resize]
