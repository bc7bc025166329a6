"""Plans: float32 `[N, H, 2]`, H way points in the plane, drawn as a grid of small plots."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jaxalign.modalities import arrays, figures
from jaxalign.modalities.modality import (
  Modality,
  SampleError,
  all_finite,
  check_finite,
  unit_norm,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes

  from jaxalign.types import Array

Circle = tuple[float, float, float]  # x, y, radius

NUM_RESAMPLED = 16  # way points that features are made of
CELL = 1.5  # inches of a plot's side
LIMIT = 1.1  # of both axes: the field is [-1, 1]^2


def check(plans: np.ndarray) -> None:
  """Raises `SampleError` unless plans are finite `[N, H, 2]` with H at least 2."""
  _check_shape(plans.shape)
  check_finite(plans, "plans")


def fit(plans: "Array") -> "Array":
  """bool `[N]`, in a program: the plans that `check` would pass."""
  _check_shape(plans.shape)
  return all_finite(plans)


def _check_shape(shape: tuple[int, ...]) -> None:
  if len(shape) != 3 or shape[1] < 2 or shape[2] != 2:
    raise SampleError(f"expected plans [N, H, 2], H at least 2, got shape {shape}")


def waypoints(plans: np.ndarray) -> np.ndarray:
  """The shape of the way: 16 points equally spaced in time, relative to the first; `[N, 32]`.

  Plans of other lengths are comparable, and neither place nor size of a plan counts.
  """
  position = np.linspace(0.0, plans.shape[1] - 1, NUM_RESAMPLED)
  before = np.minimum(position.astype(int), plans.shape[1] - 2)
  share = (position - before)[:, None]
  resampled = (1.0 - share) * plans[:, before] + share * plans[:, before + 1]
  return unit_norm((resampled - resampled[:, :1]).reshape(len(plans), -1))


def picture(
  plans: Sequence[np.ndarray | None],
  captions: Sequence[str],
  columns: int,
  *,
  obstacles: Sequence[Circle] = (),
) -> Image.Image:
  """One small plot of each plan `[H, 2]`, row by row, its caption above it.

  A circle marks the first way point and a cross the last. A plan that is None leaves its cell
  empty.
  """
  rows = -(-len(plans) // columns)
  figure = figures.make(CELL * columns, (CELL + 0.3) * rows)
  cells = figure.subplots(rows, columns, squeeze=False).flatten()
  for axes in cells:
    axes.set_axis_off()
  for axes, plan, caption in zip(cells, plans, captions, strict=False):
    if plan is not None:
      _draw(axes, plan, caption, obstacles)
  return figures.to_image(figure)


def _draw(axes: "Axes", plan: np.ndarray, caption: str, obstacles: Sequence[Circle]) -> None:
  import matplotlib.patches

  for x, y, radius in obstacles:
    axes.add_patch(matplotlib.patches.Circle((x, y), radius, color="0.8"))
  color = figures.color_of(caption)
  axes.plot(plan[:, 0], plan[:, 1], ".-", color=color, linewidth=1.0, markersize=3)
  axes.plot(*plan[0], "o", color="black", markersize=4)
  axes.plot(*plan[-1], "x", color="black", markersize=5)
  axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
  axes.set_axis_on()
  axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
  axes.set_title(caption.replace(": ", ":\n", 1), fontsize=5)


def make(obstacles: Sequence[Circle] = ()) -> Modality:
  """Plans in a field with round obstacles `(x, y, radius)`, which pictures show."""
  return Modality(
    unit="plans",
    check=check,
    features={"waypoints": waypoints},
    picture=functools.partial(picture, obstacles=tuple(obstacles)),
    write=arrays.write,
    fit=fit,
    read=functools.partial(arrays.read, check=check),
  )


PLANS = make()
