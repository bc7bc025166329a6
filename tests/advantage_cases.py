"""Rewards in groups, and the functions that make advantages of them."""

import functools

import jax
import numpy as np

from jaxalign.labels import advantages

REWARDS = np.array([1.0, 3.0, 5.0, 10.0, 10.0, 7.0], np.float32)
GROUP = np.array([0, 0, 0, 1, 1, 2], np.int32)  # one ordinary, one without spread, one of one


# Compiled once per shape: op by op, the same tests take three times as long.
per_record_normalize = jax.jit(
  advantages.per_record_normalize, static_argnames=("min_count", "epsilon")
)


def close(actual, expected, rtol=1e-6, atol=1e-6):
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


GROUPED = {
  "ddof 0": functools.partial(advantages.group_normalize, epsilon=1e-8, ddof=0),
  "ddof 1": functools.partial(advantages.group_normalize, epsilon=1e-8, ddof=1),
  "global std": functools.partial(advantages.group_mean_global_std, epsilon=1e-4),
  "leave one out": advantages.leave_one_out,
}
