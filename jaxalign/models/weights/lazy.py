"""Arrays that lie in a file until they are indexed.

`np.asarray(array)` reads all of one, `array[index]` a part, so that each device's part of a large
weight can be read by itself and a whole model is never held on the host.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxalign import checks

Index = tuple[slice, ...]  # one for each axis, with start and stop, and step 1

_DIVERGED = (
  "it comes of a training that diverged, or of a cast to half precision; take another version"
)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
  """A float32 array of known shape whose parts are read when asked for.

  Attributes:
    shape: as of any array.
    read: the part at an index, in any precision.
    name: where it is stored, for messages.
  """

  shape: tuple[int, ...]
  read: Callable[[Index], np.ndarray]
  name: str = "an array in a file"

  dtype = np.dtype(np.float32)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def __getitem__(self, index: Any) -> np.ndarray:
    """Slices of step 1 read what they select; any other index reads everything first.

    Raises ValueError, naming the array, for a NaN or an inf: it would go through every program.
    """
    entries = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(entry, slice) and entry.step in (None, 1) for entry in entries):
      return np.asarray(self)[index]
    entries += (slice(None),) * (self.ndim - len(entries))
    bounds = [e.indices(size)[:2] for e, size in zip(entries, self.shape, strict=True)]
    if any(stop <= start for start, stop in bounds):  # which safetensors cannot read
      return np.zeros([max(0, stop - start) for start, stop in bounds], np.float32)
    part = self.read(tuple(slice(start, stop) for start, stop in bounds))
    if part.dtype.kind in "iub" and self.ndim:  # a scalar may be an adapter's alpha
      raise ValueError(
        f"{self.name}: expected weights in float32, half precision or float8, found {part.dtype}\n"
        "take another variant of the file; quantised ones are not supported"
      )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused below
      part = np.asarray(part, np.float32, order="C")  # np.ascontiguousarray gives a scalar an axis
    checks.check_finite(self.name, part, _DIVERGED)
    return part

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    if copy is False:
      raise ValueError("an array in a file cannot be had without a copy")
    return self[()].astype(dtype or self.dtype, copy=False)

  def transpose(self, axes: Sequence[int]) -> "LazyArray":
    """As `np.ndarray.transpose`."""
    inverse = [axes.index(axis) for axis in range(self.ndim)]

    def read(index):
      return self.read(tuple(index[axis] for axis in inverse)).transpose(axes)

    return LazyArray(tuple(self.shape[axis] for axis in axes), read, self.name)

  def rows(self, start: int, stop: int) -> "LazyArray":
    """`self[start:stop]`, not read yet."""

    def read(index):
      first, *rest = index
      return self.read((slice(start + first.start, start + first.stop), *rest))

    return LazyArray((stop - start, *self.shape[1:]), read, self.name)

  def concatenate(self, other: "LazyArray") -> "LazyArray":
    """These rows, then those of another array, not read yet; all axes but the first are equal."""
    if self.shape[1:] != other.shape[1:]:
      raise ValueError(f"{other.name}: expected {('any', *self.shape[1:])}, found {other.shape}")
    count = self.shape[0]

    def read(index):
      first, *rest = index
      of_self = slice(first.start, min(first.stop, count))
      of_other = slice(max(first.start - count, 0), first.stop - count)
      parts = [(self, of_self), (other, of_other)]
      return np.concatenate([a.read((own, *rest)) for a, own in parts if own.start < own.stop])

    return LazyArray((count + other.shape[0], *self.shape[1:]), read, self.name)

  def reshape_units(self, shape: Sequence[int]) -> "LazyArray":
    """The array with trailing axes of size 1 added or left out; ValueError for any other shape."""
    shape = tuple(shape)
    common = min(len(shape), self.ndim)
    if shape[:common] != self.shape[:common] or math.prod(shape) != math.prod(self.shape):
      raise ValueError(f"expected {self.shape} but for trailing ones, got {shape}")

    def read(index):
      own = index[:common] + (slice(0, 1),) * (self.ndim - common)
      sizes = [entry.stop - entry.start for entry in index]
      return self.read(own).reshape(sizes)

    return LazyArray(shape, read, self.name)
