"""Points: float32 `[N, D]`, D numbers each, drawn together in one scatter plot."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jaxalign.modalities import arrays, figures
from jaxalign.modalities.modality import Modality, SampleError, all_finite, check_finite

if TYPE_CHECKING:
  from matplotlib.axes import Axes

  from jaxalign.types import Array


def check(points: np.ndarray) -> None:
  """Raises `SampleError` unless points are finite `[N, D]` with D at least 1."""
  _check_shape(points.shape)
  check_finite(points, "points")


def fit(points: "Array") -> "Array":
  """bool `[N]`, in a program: the points that `check` would pass."""
  _check_shape(points.shape)
  return all_finite(points)


def _check_shape(shape: tuple[int, ...]) -> None:
  if len(shape) != 2 or shape[1] < 1:
    raise SampleError(f"expected points [N, D], D at least 1, got shape {shape}")


def angles(points: np.ndarray) -> np.ndarray:
  """Each coordinate as a direction, at half a radian a unit; `[N, 2 D]`.

  The product of two rows is the mean of cos((x - y) / 2) over coordinates: 1 for equal points, and
  falling with their distance up to 2 pi. The coordinates themselves, at norm 1, would lose it.
  """
  half = 0.5 * points.astype(np.float64)
  return np.concatenate([np.cos(half), np.sin(half)], axis=1) / np.sqrt(points.shape[1])


def picture(
  points: Sequence[np.ndarray | None], captions: Sequence[str], columns: int
) -> Image.Image:
  """All points `[D]` in one plot: the first two coordinates, or a histogram of the only one.

  One point says little, so there is no grid of cells. Captions that begin with "before:" or
  "after:", as `before_and_after` makes them, tell two sets of points apart by colour.

  Args:
    points: those that are None are left out; ValueError if all are.
    captions: one for each point.
    columns: has no effect.
  """
  del columns
  groups: dict[str, list[np.ndarray]] = {}
  for point, caption in zip(points, captions, strict=True):
    if point is not None:
      groups.setdefault(figures.group_of(caption), []).append(point)
  if not groups:
    raise ValueError("expected at least one point to draw, found none")
  stacked = {name: np.stack(groups[name]) for name in sorted(groups, reverse=True)}
  figure = figures.make(4.0, 4.0)
  axes = figure.subplots()
  dims = {found.shape[1] for found in stacked.values()}
  _histogram(axes, stacked) if dims == {1} else _scatter(axes, stacked)
  if set(stacked) != {""}:
    axes.legend()
  return figures.to_image(figure)


def _scatter(axes: "Axes", groups: dict[str, np.ndarray]) -> None:
  for name, points in groups.items():
    color = figures.COLORS.get(name, figures.DEFAULT_COLOR)
    axes.scatter(points[:, 0], points[:, 1], s=8, alpha=0.5, linewidths=0, color=color, label=name)
  axes.set_aspect("equal", adjustable="datalim")
  axes.grid(alpha=0.3)


def _histogram(axes: "Axes", groups: dict[str, np.ndarray]) -> None:
  everything = np.concatenate(list(groups.values()))[:, 0]
  bins = np.histogram_bin_edges(everything, bins=min(40, max(5, len(everything) // 8)))
  for name, points in groups.items():
    color = figures.COLORS.get(name, figures.DEFAULT_COLOR)
    axes.hist(points[:, 0], bins=bins.tolist(), alpha=0.6, color=color, label=name)


read = functools.partial(arrays.read, check=check)
POINTS = Modality(
  "points", check, {"angles": angles}, picture, arrays.write, shown=1000, fit=fit, read=read
)
