"""Samples that are plain arrays, as files: one `.npy` each."""

import io
import os
import pathlib
from collections.abc import Callable

import numpy as np


def read(
  source: str | os.PathLike | bytes, *, check: Callable[[np.ndarray], None]
) -> np.ndarray:
  """One sample, float32, of a `.npy` file or the bytes of one.

  Args:
    source: path or content. Pickled objects in it are refused, for reading them would run code.
    check: of the kind of samples, see `Modality`.

  Raises:
    ValueError: missing, truncated, not of numbers, or not what `check` expects of `[1, ...]`.
  """
  name = "the bytes given" if isinstance(source, bytes) else f'"{source}"'
  try:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
      stored = np.lib.format.read_array(file, allow_pickle=False)
    if stored.dtype.kind not in "fiu":
      raise ValueError(f"expected real numbers, got {stored.dtype}")
    with np.errstate(over="ignore"):  # too large for float32: the inf is refused by the check
      sample = stored.astype(np.float32)
    check(sample[None])
  except Exception as error:  # a broken header makes numpy's parser raise nearly anything
    raise ValueError(f"unreadable array: expected a whole .npy array in {name}: {error}") from error
  return sample


def write(samples: np.ndarray, folder: str | os.PathLike) -> list[pathlib.Path]:
  """Writes each sample as a file, 0000.npy and on."""
  folder = pathlib.Path(folder)
  paths = [folder / f"{index:04d}.npy" for index in range(len(samples))]
  for path, sample in zip(paths, samples, strict=True):
    np.save(path, sample)
  return paths
