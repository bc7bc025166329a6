"""Paired comparison of two models on the same records and noise, and the diversity of one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign import streams

NUM_RESAMPLES = 10_000


def compare(
  base: np.ndarray, aligned: np.ndarray, record_ids: np.ndarray
) -> dict[str, Any]:
  """Means, their paired difference with a 95 % bootstrap interval, and the win rate.

  Samples of one record are not independent, so records are resampled, not samples. A tie counts
  half a win. A mean is over a model's verdicts, what is paired over samples with both verdicts, and
  both are None of nothing; "abstained" counts the samples without one.

  Args:
    base, aligned: `[N]` rewards of the two models on the same records and noise, NaN where there is
      no verdict.
    record_ids: `[N]`, which record each belongs to.
  """
  difference = np.asarray(aligned, np.float64) - np.asarray(base, np.float64)
  paired = ~np.isnan(difference)
  difference, record_ids = difference[paired], np.asarray(record_ids)[paired]
  wins = (difference > 0) + 0.5 * (difference == 0)
  return {
    "base": mean(base),
    "aligned": mean(aligned),
    "difference": mean(difference),
    "interval_95": bootstrap_interval(difference, record_ids),
    "win_rate": mean(wins),
    "abstained": {
      name: int(np.isnan(values).sum()) for name, values in (("base", base), ("aligned", aligned))
    },
  }


def mean(values: np.ndarray) -> float | None:
  """Of those that are numbers; None of none."""
  known = np.asarray(values)[~np.isnan(values)]
  return float(known.mean()) if known.size else None


def bootstrap_interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float] | None:
  """The 2.5 and 97.5 percentiles of the mean of `values` `[N]`, resampling whole clusters.

  None if there is a single cluster, which says nothing about others.
  """
  _, inverse = np.unique(clusters, return_inverse=True)
  totals = np.bincount(inverse, weights=values)
  sizes = np.bincount(inverse)
  if len(totals) < 2:
    return None
  rng = streams.generator(0, "bootstrap")
  means = []
  for _ in range(NUM_RESAMPLES // 100):  # in pieces: ten thousand records at once take gigabytes
    drawn = rng.integers(len(totals), size=(100, len(totals)))
    means.append(totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
  low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
  return float(low), float(high)


def by_category(values: np.ndarray, categories: list[str]) -> Mapping[str, float | None]:
  """Mean of `values` `[N]` in each category, in order of first appearance."""
  labels = np.array(categories)
  return {name: mean(values[labels == name]) for name in dict.fromkeys(categories)}


def mean_pairwise_distance(features: np.ndarray, clusters: np.ndarray) -> float | None:
  """Mean of 1 - cosine over the pairs of samples of one record, records with a pair counted alike.

  0 if all samples of each record are the same, 1 if they are orthogonal; None if no record has two.

  Args:
    features: `[N, F]`, rows of norm 1.
    clusters: `[N]`, the record of each.
  """
  means = []
  for cluster in np.unique(clusters):
    rows = features[clusters == cluster]
    n = len(rows)
    if n > 1:
      # The sum of all cosines is the squared norm of the sum; the n of the diagonal are 1.
      cosines = (np.square(rows.sum(axis=0)).sum() - n) / (n * (n - 1))
      means.append(1.0 - cosines)
  return float(np.mean(means)) if means else None


def vendi_score(features: np.ndarray) -> float:
  """The effective number of different samples, 1 (all the same) to N (orthogonal).

    exp(-sum_i lambda_i log lambda_i),     lambda the eigenvalues of K / N, K the cosines

  Friedman & Dieng 2022 (arXiv:2210.02410) eq. 1. `features` is `[N, F]`, rows of norm 1.
  """
  eigenvalues = np.square(np.linalg.svd(features, compute_uv=False)) / len(features)
  eigenvalues = eigenvalues[eigenvalues > 1e-12]
  return float(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))
