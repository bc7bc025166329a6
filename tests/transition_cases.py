"""Reverse steps compiled once for all tests, and what they are given."""

import jax
import numpy as np

from jaxalign.diffusion import transitions

FLOW = "FlowMatchEulerDiscreteScheduler"
# Compiled once for all cases: only the step's numbers differ.
JITTED = {
  name: jax.jit(kind.transition, static_argnames="prediction_type")
  for name, kind in transitions.TRANSITIONS.items()
}


def apply(name, process, x_t, prediction, step):
  return JITTED[name](x_t, prediction, step, **process.transition.keywords)


def draw(shape=(2, 5, 3, 2), seed=0):
  return np.random.default_rng(seed).normal(size=(3, *shape)).astype(np.float32)


KNOBS = {
  "ddim": dict(eta=0.6),
  "ddpm": {},
  "euler": {},
  "flow_sde": dict(noise_level=0.7),
  "dance_sde": dict(eta=0.3),
  "cps": dict(noise_level=0.8),
}
