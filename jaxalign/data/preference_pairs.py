"""Pairs of images to train on, and which of them a step uses."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxalign import streams
from jaxalign.data import preferences
from jaxalign.types import Record


class PreferencePairs:
  """The pairs of many records, the preferred image first.

  Rows, `len` and what `samples` takes count pairs; epochs and batches count records. A record is
  what a person was shown and judged, and nine ranked images, which make 36 pairs, are one of them
  just as two images are: a step draws records, and of each of them one pair.

  Attributes:
    records: of each of the `P` pairs, what it was made for, `{"prompt": str}`.
    p: float32 `[P]`, P(the first image is better), 1 for a plain choice and 0.5 for a tie.
    record: int32 `[P]`, from 0 and ascending, which record a pair is of. Records without a pair
      are not counted.
    num_records: how many there are.
    size: (height, width) of the images that `samples` returns.
  """

  def __init__(
    self,
    records: Sequence[preferences.Record],
    *,
    size: tuple[int, int],
    ties: str = "drop",
    resize: bool = False,
  ):
    """Takes every pair that `to_pairs(record, ties)` finds.

    Args:
      size: (height, width).
      resize: bring images to `size`, whatever their aspect ratio; else another size is an error.

    Raises:
      ValueError: no record has a pair, or an image is not of `size`.
    """
    height, width = size
    self.size, self._resize = (height, width), resize
    found = [preferences.to_pairs(record, ties) for record in records]
    self.p = np.concatenate([np.zeros(0, np.float32), *[pairs.p for pairs in found]])
    counts = np.array([len(pairs.p) for pairs in found if len(pairs.p)], np.int32)
    self.num_records = len(counts)
    self.record = np.repeat(np.arange(self.num_records, dtype=np.int32), counts)
    self._counts, self._firsts = counts, np.cumsum(counts) - counts  # of the rows of each record
    self.records: list[Record] = []
    self._candidates: list[tuple[preferences.Candidate, preferences.Candidate]] = []
    for record, pairs in zip(records, found, strict=True):
      for w, l in zip(pairs.winner, pairs.loser, strict=True):
        self.records.append({"prompt": record.prompt})
        self._candidates.append((record.candidates[w], record.candidates[l]))
    if not self._candidates:
      raise ValueError(
        f'preferences: expected pairs of images; none of {len(records)} records has one with '
        f'ties="{ties}"'
      )
    for w, l in self._candidates:
      self._check_size(w.size)
      self._check_size(l.size)

  def __len__(self) -> int:
    return len(self._candidates)

  def draw_for_step(
    self, seed: int, step: int, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> np.ndarray:
    """Rows of the pairs of a step, int32 `[batch_size / process_count]`.

    A pure function of its arguments: each epoch is a new order of all records, without replacement,
    with one pair of each, drawn uniformly; the steps cut the row of epochs into batches. So every
    record counts once, and the plain mean of a loss over the batch is the one to minimise.
    `batch_size` is global: process `k` of `n` gets its k-th n-th, so the batch does not depend on
    how many processes share it.
    """
    if step < 0 or batch_size < 1:
      raise ValueError(f"expected step >= 0 and batch_size >= 1, got {step} and {batch_size}")
    if batch_size % process_count or not 0 <= process_index < process_count:
      raise ValueError(
        f"expected a batch that {process_count} processes share evenly and one of them, got "
        f"{batch_size} pairs for process {process_index}"
      )
    epoch, start = divmod(step * batch_size, self.num_records)
    last_epoch = (step * batch_size + batch_size - 1) // self.num_records
    orders = [self._rows_of_epoch(seed, e) for e in range(epoch, last_epoch + 1)]
    share = batch_size // process_count
    start += process_index * share
    return np.concatenate(orders)[start : start + share].astype(np.int32)

  def _rows_of_epoch(self, seed: int, epoch: int) -> np.ndarray:  # [num_records]
    rng = streams.generator(seed, "pair order", epoch)
    records = rng.permutation(self.num_records)
    return self._firsts[records] + rng.integers(self._counts[records])

  def samples(self, rows: np.ndarray) -> np.ndarray:
    """uint8 `[B, 2, H, W, 3]` of pairs `[B]`, the preferred image first."""
    pixels = [self._fit(c.pixels()) for row in rows for c in self._candidates[int(row)]]
    return np.stack(pixels).reshape(len(rows), 2, *self.size, 3)

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
