"""A quadratic reward of points, under which the optimum of alignment is known."""

from collections.abc import Sequence

import numpy as np

from jaxalign.rewards.contract import DeviceReward, Record


def make_quadratic(
  *,
  curvature: Sequence[Sequence[float]] = ((0.6, 0.0), (0.0, 1.0)),
  slope: Sequence[float] = (0.8, -0.5),
  shapes_only: bool = False,
) -> DeviceReward:
  """`slope x - x curvature x / 2` of points x `[B, D]`; `worlds.gaussian.tilt` has the optimum.

  Args:
    curvature: symmetric, `[D, D]`; positive where the reward has a maximum.
    slope: `[D]`.
    shapes_only: parameters are shapes, for programs that are compiled and not run.

  Raises:
    ValueError: shapes that do not fit, or a curvature that is not symmetric.
  """
  params = {
    "curvature": np.asarray(curvature, np.float32),
    "slope": np.asarray(slope, np.float32),
  }
  expected = (params["slope"].size, params["slope"].size)
  if params["curvature"].shape != expected or params["slope"].ndim != 1:
    raise ValueError(
      f"curvature and slope: expected [D, D] and [D], got {params['curvature'].shape} and "
      f"{params['slope'].shape}"
    )
  if not (params["curvature"] == params["curvature"].T).all():
    raise ValueError(f"curvature: expected a symmetric matrix, got {curvature}")

  def encode(records: Sequence[Record]) -> np.ndarray:
    return np.zeros((len(records), 1), np.float32)  # nothing of a record counts

  def score(params, points, query):
    del query
    from jaxalign.worlds import gaussian

    return gaussian.QuadraticReward(**params)(points)

  if shapes_only:
    import jax

    params = jax.eval_shape(lambda: params)
  return DeviceReward("gaussian_quadratic", params, encode, score)
