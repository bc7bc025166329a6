"""Paired comparison by hand, and the interval's coverage by simulation."""

import numpy as np
import pytest

from jaxalign.evaluation import statistics


def test_compare_by_hand():
  base = np.array([0.0, 1.0, 1.0, 0.5])
  aligned = np.array([1.0, 1.0, 0.5, 1.0])
  result = statistics.compare(base, aligned, np.array([0, 1, 2, 3]))
  assert result["base"] == 0.625 and result["aligned"] == 0.875
  assert result["difference"] == 0.25  # (1 + 0 - 0.5 + 0.5) / 4
  assert result["win_rate"] == 0.625  # two wins, one tie, one loss: 2.5 / 4
  low, high = result["interval_95"]
  assert -0.5 <= low < 0.25 < high <= 1.0


def test_ties_everywhere_are_half_a_win_and_an_interval_of_no_width():
  result = statistics.compare(np.ones(6), np.ones(6), np.arange(6))
  assert result["win_rate"] == 0.5 and result["difference"] == 0.0
  assert result["interval_95"] == (0.0, 0.0)


def test_swapping_the_models_mirrors_everything():
  rng = np.random.default_rng(0)
  base, aligned, ids = rng.normal(size=30), rng.normal(size=30), np.repeat(np.arange(10), 3)
  one, other = statistics.compare(base, aligned, ids), statistics.compare(aligned, base, ids)
  assert one["difference"] == pytest.approx(-other["difference"])
  assert one["win_rate"] == pytest.approx(1 - other["win_rate"])
  np.testing.assert_allclose(one["interval_95"], -np.array(other["interval_95"])[::-1])


def test_differences_are_taken_in_float64():
  # 16777217 is not a float32: a float32 mean of differences of large rewards would lose the one.
  base = np.full(3, 16777216.0, np.float32)
  assert statistics.compare(base, base + np.float64(1.0), np.arange(3))["difference"] == 1.0


def test_one_prompt_has_no_interval_rather_than_one_of_no_width():
  assert statistics.bootstrap_interval(np.array([1.0, 2.0, 6.0]), np.zeros(3, int)) is None


def test_two_prompts_of_unequal_size_by_hand():
  # Resampling {a: [0], b: [1, 1, 1]} gives aa, ab, ba, bb: means 0, 3/4, 3/4, 1.
  low, high = statistics.bootstrap_interval(np.array([0.0, 1, 1, 1]), np.array([7, 3, 3, 3]))
  assert (low, high) == (0.0, 1.0)


def test_the_interval_is_deterministic_and_ignores_names_of_prompts():
  values = np.random.default_rng(1).normal(size=12)
  ids = np.repeat([5, 9, 70, 71], 3)
  first = statistics.bootstrap_interval(values, ids)
  assert first == statistics.bootstrap_interval(values, ids)
  np.testing.assert_allclose(first, statistics.bootstrap_interval(values, ids + 100))
  named = np.array(["a", "b", "c", "d"])[np.repeat(np.arange(4), 3)]
  np.testing.assert_allclose(first, statistics.bootstrap_interval(values, named))


def test_the_standard_error_of_independent_values():
  values = np.random.default_rng(2).normal(size=400)
  low, high = statistics.bootstrap_interval(values, np.arange(400))
  expected = 2 * 1.96 * values.std() / np.sqrt(400)
  assert high - low == pytest.approx(expected, rel=0.05)


def test_coverage_with_prompts_whose_images_are_alike(monkeypatch):
  """95 % intervals hold the truth about 95 times in 100; resampling images would do far worse."""
  monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)
  rng = np.random.default_rng(3)
  prompts, images, rounds = 40, 6, 400
  ids = np.repeat(np.arange(prompts), images)
  covered = by_image = 0
  for _ in range(rounds):
    # Variance 1 between prompts and 0.25 within: images of a prompt correlate by 0.8.
    values = 0.3 + np.repeat(rng.normal(size=prompts), images) + 0.5 * rng.normal(size=len(ids))
    low, high = statistics.bootstrap_interval(values, ids)
    covered += low <= 0.3 <= high
    low, high = statistics.bootstrap_interval(values, np.arange(len(ids)))
    by_image += low <= 0.3 <= high
  # Nominal 0.95, a little less with 40 clusters; standard error sqrt(0.05 * 0.95 / 400) = 0.011.
  assert 0.89 <= covered / rounds <= 0.985
  assert by_image / rounds < 0.8


def test_by_category_in_order_of_appearance():
  means = statistics.by_category(np.array([1.0, 0.0, 5.0, 2.0]), ["b", "a", "b", "a"])
  assert list(means.items()) == [("b", 3.0), ("a", 1.0)]


def test_pairwise_distance_by_hand():
  rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
  assert statistics.mean_pairwise_distance(rows[:2], np.array([7, 7])) == pytest.approx(0.0)
  assert statistics.mean_pairwise_distance(rows[1:3], np.array([7, 7])) == pytest.approx(1.0)
  # Record 0: cosines 1, 0, 0 -> 2/3; record 1: cosine -0.6 -> 1.6; record 2 has one sample.
  prompts = np.array([0, 0, 0, 1, 1, 2])
  rows = np.concatenate([rows, [[1.0, 0.0]]])
  expected = (2 / 3 + 1.6) / 2
  assert statistics.mean_pairwise_distance(rows, prompts) == pytest.approx(expected)
  assert statistics.mean_pairwise_distance(rows[:3], np.arange(3)) is None


def test_vendi_counts_different_images():
  eye = np.eye(6)
  assert statistics.vendi_score(eye[:4]) == pytest.approx(4.0)
  assert statistics.vendi_score(np.repeat(eye[:1], 5, axis=0)) == pytest.approx(1.0)
  assert statistics.vendi_score(np.repeat(eye[:3], 2, axis=0)) == pytest.approx(3.0)
  # Two images at cosine c: eigenvalues (1 +- c) / 2.
  c = 0.6
  rows = np.array([[1.0, 0.0], [c, np.sqrt(1 - c**2)]])
  expected = np.exp(-sum(p * np.log(p) for p in ((1 + c) / 2, (1 - c) / 2)))
  assert statistics.vendi_score(rows) == pytest.approx(expected)
