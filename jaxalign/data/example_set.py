"""The examples of stored preferences in batches: which of them a step trains on."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from jaxalign import streams
from jaxalign.data import preferences
from jaxalign.data.candidates import Candidate
from jaxalign.data.examples import Examples
from jaxalign.types import Record


class ExampleSet:
  """The examples of many records.

  Rows, `len` and what `samples` takes count examples; epochs and batches count records. A record is
  what a person was shown and judged, and nine ranked images, which make 36 pairs, are one of them
  just as two images are: a step draws records, and of each of them one example.

  Attributes:
    records: of each of the P examples, what it was made for, `{"prompt": str}`.
    values: `{name: [P, ...]}`.
    record: int32 `[P]`, from 0 and ascending, which record an example is of. Records without one
      are not counted.
    num_records: how many there are.
    each: the axis of an example's samples: `()`, or `(n,)`.
    size: (height, width) of the images that `samples` returns.
  """

  def __init__(
    self,
    records: Sequence[preferences.Record],
    examples: Callable[[preferences.Record], Examples],
    *,
    size: tuple[int, int],
    resize: bool = False,
  ):
    """Takes every example that `examples` makes of a record.

    Args:
      records: as they were read.
      examples: see `ExamplesFn`.
      size: (height, width).
      resize: bring images to `size`, whatever their aspect ratio; else another size is an error.

    Raises:
      ValueError: no record has an example, or an image is not of `size`.
    """
    height, width = size
    self.size, self._resize = (height, width), resize
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
    self._candidates: list[list[Candidate]] = []
    for record, one in zip(records, found, strict=True):
      for chosen in one.candidates:
        self.records.append({"prompt": record.prompt})
        self._candidates.append([record.candidates[k] for k in np.atleast_1d(chosen)])
    for candidates in self._candidates:
      for candidate in candidates:
        self._check_size(candidate.size)

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
    """uint8 `[B, H, W, 3]`, or `[B, n, H, W, 3]`, of examples `[B]`."""
    pixels = [self._fit(c.pixels()) for row in rows for c in self._candidates[int(row)]]
    return np.stack(pixels).reshape(len(rows), *self.each, *self.size, 3)

  def _fit(self, pixels: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    self._check_size((height, width))  # again, because a file may have changed since it was read
    if (height, width) == self.size:
      return pixels
    resized = Image.fromarray(pixels).resize(self.size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized)

  def _check_size(self, size: tuple[int, int]) -> None:
    if size != self.size and not self._resize:
      raise ValueError(
        f"preferences: expected images of (height, width) {self.size}, found one of {size}; "
        "resize them beforehand, or pass resize=True"
      )
