"""MixGRPO: noise, and training, in a window of steps that moves along the chain (arXiv:2507.21802).

The other steps are deterministic, and only those in the window are trained: fewer gradients, and
chains whose rewards tell more of the steps that have noise.
"""

import numpy as np

from jaxalign.labels import advantages
from jaxalign.methods import ddpo
from jaxalign.methods.base import Method
from jaxalign.pipeline import Pipeline


def make(
  pipeline: Pipeline,
  *,
  advantage: advantages.Estimator,
  clip_range: float,
  window_size: int,
  window_stride: int,
  window_every: int,
) -> Method:
  """MixGRPO: DDPO's clipped surrogate in the window, without a KL.

  Args:
    pipeline: the model; its process has noise in every step that may be in the window.
    advantage: in the paper of groups, of each reward apart (`per_reward`).
    clip_range: as in `ddpo.make_importance_sampling`, 1e-4.
    window_size: steps in the window, 4 of 25 in the paper.
    window_stride: steps that it moves on, 1; from the end it starts again.
    window_every: iterations between two moves, 25.
  """
  steps = pipeline.process.stochastic_steps()
  for name, value, most in (
    ("window_size", window_size, len(steps)),
    ("window_stride", window_stride, len(steps)),
    ("window_every", window_every, None),
  ):
    if value < 1 or (most is not None and value > most):
      limit = f"1 to {most}, the steps with noise" if most else "at least 1"
      raise ValueError(f"config.method.{name}: expected {limit}, got {value}")
  starts = range(0, len(steps) - window_size + 1, window_stride)

  def window(iteration: int) -> np.ndarray:  # [S]
    start = starts[iteration // window_every % len(starts)]
    scale = np.zeros(pipeline.table.num_steps, np.float32)
    scale[steps[start : start + window_size]] = 1.0
    return scale

  method = ddpo.make_importance_sampling(
    pipeline, clip_range=clip_range, kl_weight=0.0, advantage=advantage
  )
  return method._replace(data=method.data._replace(window=window))
