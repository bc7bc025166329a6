"""Image features by name, for measures of diversity: `FEATURES[name](images) -> [N, F]`.

images: float32 `[N, H, W, 3]` in [0, 1]. Every row of the result has norm 1, so that a product of
rows is a cosine.
"""

from collections.abc import Callable

import numpy as np

from jaxalign.checks import closest

FeatureFn = Callable[[np.ndarray], np.ndarray]

GRID = 8


def pixels(images: np.ndarray) -> np.ndarray:
  """Colours on an 8 x 8 grid around mid-grey: layout and colour, and no network.

  Images whose sides are no multiple of 8 lose their last rows and columns.
  """
  N, H, W, C = images.shape
  h, w = H // GRID, W // GRID
  if not h or not w:
    raise ValueError(f"features: expected images of at least {GRID} x {GRID}, got {H} x {W}")
  blocks = images[:, : h * GRID, : w * GRID].reshape(N, GRID, h, GRID, w, C)
  return normalize(blocks.mean(axis=(2, 4)).reshape(N, -1) - 0.5)


def normalize(features: np.ndarray) -> np.ndarray:
  """Rows divided by their norm; a row of zeros stays one."""
  features = features.astype(np.float64)
  return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


FEATURES: dict[str, FeatureFn] = {"pixels": pixels}


def get(name: str) -> FeatureFn:
  """The features called `name`."""
  if name not in FEATURES:
    raise ValueError(
      f"config.evaluation.features: unknown {name!r}{closest(name, FEATURES)}; known: "
      f"{', '.join(FEATURES)}"
    )
  return FEATURES[name]
