"""What a sample looks like: the one value that knows whether a model makes images or plans."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
  from jaxalign.types import Array

FeatureFn = Callable[[np.ndarray], np.ndarray]
ReadFn = Callable[[pathlib.Path | bytes], np.ndarray]  # path or content of a file -> sample

ResizeFn = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class SampleError(ValueError):
  """A sample that must not be scored. `index` is that of the first one in its batch."""

  def __init__(self, message: str, *, index: int | None = None):
    super().__init__(message)
    self.index = index


class Modality(NamedTuple):
  """A kind of samples. All functions but `fit` run on the host and take numpy arrays `[N, ...]`.

  unit: what logs count, in the plural, such as "images".
  check: raises `SampleError` unless samples have the rank and the range of this kind and are
    finite.
  features: by name, `samples -> [N, F]` with rows of norm 1, for measures of diversity. The first
    is the default.
  picture: `(samples, captions, columns) -> PIL image`, in RGB: the samples in rows, each with its
    caption. A sample may be None, which leaves its cell empty.
  write: `(samples, folder) -> paths`: one file a sample, in a folder that is there.
  shown: how many samples a picture of a comparison is of, at most.
  fit: `samples -> bool [N]`, a part of programs: which samples `check` would pass, so that those
    which are scored on the device are looked at there. A wrong rank raises as in `check`. None
    brings all samples to the host to be checked.
  read: `(path or bytes of a file) -> sample`, one sample of a data set as it is stored, decoded and
    checked; all samples of a kind have one dtype. ValueError, which names the file, if it is not
    whole. None: samples of this kind cannot be learned from in files.
  resize: by name, `(sample, shape) -> sample`, of what `read` gives. None: they cannot be resized.
  """

  unit: str
  check: Callable[[np.ndarray], None]
  features: Mapping[str, FeatureFn]
  picture: Callable[[Sequence[np.ndarray | None], Sequence[str], int], Image.Image]
  write: Callable[[np.ndarray, pathlib.Path], list[pathlib.Path]]
  shown: int = 24
  fit: "Callable[[Array], Array] | None" = None
  read: ReadFn | None = None
  resize: Mapping[str, ResizeFn] | None = None


def before_and_after(
  modality: Modality,
  before: np.ndarray,
  after: np.ndarray,
  captions: Sequence[str],
  columns: int,
) -> Image.Image:
  """Pairs of rows: samples of the base model above, of the aligned model below, on one noise."""
  cells: list[Any] = []
  labels: list[str] = []
  for start in range(0, len(before), columns):
    part = slice(start, start + columns)
    for name, samples in (("before", before[part]), ("after", after[part])):
      empty = columns - len(samples)  # a short last row is filled, so that its pair lies below it
      cells += [*samples, *[None] * empty]
      labels += [f"{name}: {caption}" for caption in captions[part]] + [""] * empty
  return modality.picture(cells, labels, columns)


def check_finite(samples: np.ndarray, unit: str) -> None:
  """Raises `SampleError`, naming the first, if a sample has a NaN or an inf."""
  bad = ~np.isfinite(samples).all(axis=tuple(range(1, samples.ndim)))
  if bad.any():
    index = int(bad.argmax())
    message = f"expected finite {unit}, got {bad.sum()} of {len(samples)} with NaN or inf"
    raise SampleError(f"{message}; the first is at index {index}", index=index)


def all_finite(samples: "Array") -> "Array":
  """bool `[N]`, in a program: the samples that `check_finite` has nothing against."""
  import jax.numpy as jnp

  return jnp.isfinite(samples).all(axis=tuple(range(1, samples.ndim)))


def unit_norm(features: np.ndarray) -> np.ndarray:
  """Rows `[N, F]` divided by their norm, so that a product of rows is a cosine; zeros stay."""
  features = features.astype(np.float64)
  return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
