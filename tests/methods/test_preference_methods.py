"""Diffusion-DPO, IPO and D3PO: identities at the reference, the published values, the clamp."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy
from toy_policy import FROZEN, PARAMS, PIPELINE, REFERENCE

from jaxalign import losses, methods
from jaxalign.diffusion import log_ratios
from jaxalign.methods import diffusion_dpo

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
DPO_CASES = [
  case
  for case in json.loads((GOLDEN / "transitions_and_losses.json").read_text())
  if case["kind"] == "diffusion_dpo"
]


@functools.cache
def loss_fn(name, **kwargs):
  return jax.jit(methods.make(name, PIPELINE, **kwargs).loss)


@pytest.mark.parametrize("case", DPO_CASES, ids=lambda case: case["case"])
def test_diffusion_dpo_equals_the_published_implementation(case):
  """Its predictions and targets as they are: a network that predicts x_0, which is the target.

  The published code subtracts float32 errors near 1 and multiplies by beta, so its logits carry an
  error of about beta * 2.5e-7 and its losses one of 1e-4: its arrays in float64 say so. Ours agrees
  with float64 to 1e-5, with the published logits within their error, and from those logits gives
  the published loss to 1e-6.
  """
  arrays = np.load(GOLDEN / "transitions_and_losses.npz")
  order = [0, 3, 1, 4, 2, 5]  # theirs is all winners and then all losers
  pred, target, ref_pred = (
    arrays[f"{case['case']}/{name}"][order] for name in ("pred", "target", "ref_pred")
  )
  predict = lambda params, x_t, t, cond: params["prediction"]  # noqa: E731
  conditional = PIPELINE.conditional._replace(denoise_fn=predict)
  pipeline = PIPELINE._replace(conditional=conditional, prediction_type="x_0")
  method = methods.make("dpo", pipeline, beta=case["beta"], time_weight="half", num_draws=1)
  batch = methods.Finished(
    target.reshape(3, 2, *target.shape[1:]), {}, {"p": jnp.ones(3)}
  )
  frozen = {"reference": {"prediction": ref_pred}}
  loss, values = method.loss({"prediction": pred}, frozen, batch, jax.random.key(0))

  error, ref_error = (
    np.mean(np.square(p.astype(np.float64) - target), axis=(1, 2, 3)) for p in (pred, ref_pred)
  )
  excess = error - ref_error
  exact = -0.5 * case["beta"] * (excess[0::2] - excess[1::2])
  logit = case["beta"] * values["preference/margin"]
  np.testing.assert_allclose(logit, exact, rtol=1e-5)
  np.testing.assert_allclose(loss, np.log1p(np.exp(-exact)), rtol=1e-5)
  published = arrays[f"{case['case']}/implicit_logit"]
  np.testing.assert_allclose(values["preference/margin"], published / case["beta"], atol=3e-7)
  np.testing.assert_allclose(loss.mean(), arrays[f"{case['case']}/loss"], rtol=1e-4)
  zero = jnp.zeros_like(published)
  from_published = losses.dpo_loss(published, zero, beta=1.0, p=zero + 1.0)
  np.testing.assert_allclose(from_published.mean(), arrays[f"{case['case']}/loss"], rtol=1e-6)


@pytest.mark.parametrize("name,kwargs,expected", [
  ("dpo", {"beta": 5000.0, "time_weight": "half", "num_draws": 1}, np.log([2.0, 2.0, 2.0])),
  ("dpo", {"beta": 0.1, "time_weight": "elbo", "num_draws": 1}, np.log([2.0, 2.0, 2.0])),
  # With p = 1, 0.5 and 0.8: (2 p - 1)^2 / (2 tau)^2.
  ("ipo", {"tau": 0.1, "time_weight": "half", "num_draws": 1}, np.array([25.0, 0.0, 9.0])),
  # Weights of 0.75, 1.5 and 1.5.
  ("d3po", {"beta": 0.1, "clip_range": 0.1}, np.log(2.0) * np.array([0.75, 1.5, 1.5])),
])
def test_at_the_reference_the_loss_is_known_and_nothing_is_preferred(name, kwargs, expected):
  batch = toy_policy.BATCHES[name]()
  loss, values = loss_fn(name, **kwargs)(REFERENCE, FROZEN, batch, jax.random.key(1))
  np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(values["preference/margin"], np.zeros(3), atol=1e-6)


@pytest.mark.parametrize("name,kwargs", [
  ("dpo", {"beta": 50.0, "time_weight": "half", "num_draws": 1}),
  ("d3po", {"beta": 0.1, "clip_range": 0.5}),
])
def test_swapping_winner_and_loser_negates_the_margin(name, kwargs):
  batch = toy_policy.BATCHES[name]()
  first = "x_0" if name == "dpo" else "x_s"
  swapped = dataclasses.replace(batch, **{first: getattr(batch, first)[:, ::-1]})
  if name == "d3po":
    swapped = dataclasses.replace(swapped, x_t=batch.x_t[:, ::-1])
  key = jax.random.key(3)
  _, values = loss_fn(name, **kwargs)(PARAMS, FROZEN, batch, key)
  _, other = loss_fn(name, **kwargs)(PARAMS, FROZEN, swapped, key)
  np.testing.assert_allclose(
    values["preference/margin"], -other["preference/margin"], rtol=1e-4, atol=1e-7
  )


def test_winner_and_loser_share_level_and_noise():
  """A pair of one sample twice has no margin, whatever the policy."""
  batch = toy_policy.pairs_batch()
  same = dataclasses.replace(batch, x_0=batch.x_0[:, :1].repeat(2, axis=1))
  fn = loss_fn("dpo", beta=50.0, time_weight="half", num_draws=1)
  _, values = fn(PARAMS, FROZEN, same, jax.random.key(4))
  np.testing.assert_allclose(values["preference/margin"], np.zeros(3), atol=1e-7)
  assert values["preference/log_ratio_w"].any()


def test_one_step_of_dpo_lowers_the_error_of_the_winner_and_raises_the_losers():
  batch = toy_policy.pairs_batch()
  fn, key = loss_fn("dpo", beta=50.0, time_weight="half", num_draws=1), jax.random.key(5)
  # At the reference, where beta d = 0 and both samples pull equally.
  slope = jax.grad(lambda p: fn(p, FROZEN, batch, key)[0].sum())(REFERENCE)
  moved = jax.tree.map(lambda p, g: p - 1e-3 * g, REFERENCE, slope)
  _, values = fn(moved, FROZEN, batch, key)
  assert (values["preference/margin"] * (2 * batch.labels["p"] - 1)).sum() > 0


STORED = [
  ("dpo", {"beta": 50.0, "time_weight": "half", "num_draws": 1}),
  ("ipo", {"tau": 10.0, "time_weight": "half", "num_draws": 1}),
]


@pytest.mark.parametrize("name,kwargs", STORED)
def test_a_stored_pair_may_be_swapped_while_p_becomes_one_minus_p(name, kwargs):
  batch, fn, key = toy_policy.pairs_batch(), loss_fn(name, **kwargs), jax.random.key(8)
  swapped = dataclasses.replace(batch, x_0=batch.x_0[:, ::-1], labels={"p": 1 - batch.labels["p"]})
  (loss, values), (other, others) = (fn(PARAMS, FROZEN, b, key) for b in (batch, swapped))
  np.testing.assert_allclose(loss, other, rtol=1e-5)
  np.testing.assert_allclose(values["preference/accuracy"], others["preference/accuracy"])
  assert np.abs(values["preference/margin"]).min() > 0


@pytest.mark.parametrize("name,kwargs", STORED)
def test_stored_ties_teach_nothing_at_the_reference_and_lead_back_to_it(name, kwargs):
  batch, fn, key = toy_policy.pairs_batch(), loss_fn(name, **kwargs), jax.random.key(9)
  ties = dataclasses.replace(batch, labels={"p": jnp.full(3, 0.5)})
  slope = jax.grad(lambda p: fn(p, FROZEN, ties, key)[0].sum())
  assert not any(leaf.any() for leaf in jax.tree.leaves(slope(REFERENCE)))
  moved = jax.tree.map(lambda p, g: p - 1e-3 * g, PARAMS, slope(PARAMS))
  margins = [fn(p, FROZEN, ties, key)[1]["preference/margin"] for p in (PARAMS, moved)]
  assert np.abs(margins[1]).sum() < np.abs(margins[0]).sum()


def test_a_tie_of_weight_zero_teaches_nothing():
  batch = toy_policy.step_pairs_batch()
  none = dataclasses.replace(batch, labels={"weight": jnp.zeros(3)})
  fn = loss_fn("d3po", beta=0.1, clip_range=0.1)
  slope = jax.grad(lambda p: fn(p, FROZEN, none, jax.random.key(0))[0].sum())(PARAMS)
  assert not any(leaf.any() for leaf in jax.tree.leaves(slope))


def test_d3po_by_hand_on_steps_whose_log_ratio_is_set():
  """x_s half way between the two means plus a shift: the log-ratio is shift * gap / std^2."""
  batch = toy_policy.step_pairs_batch()
  flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
  row = jax.tree.map(lambda field: field.repeat(2), batch.row)
  cond = batch.cond._replace(cond=jax.tree.map(lambda c: c.repeat(2, axis=0), batch.cond.cond))
  both = [
    PIPELINE.kernel.moments(p, flat(batch.x_t), row, cond)
    for p in (PARAMS, REFERENCE)
  ]
  (mean, std), (reference_mean, _) = both
  wanted = np.array([0.05, -0.03, 0.5, -0.5, 0.02, 0.04], np.float32)  # per latent, w and l in turn
  gap = mean - reference_mean
  shift = wanted[:, None, None, None] * std**2 / gap
  x_s = (0.5 * (mean + reference_mean) + shift).reshape(batch.x_s.shape)
  made = dataclasses.replace(batch, x_s=x_s, labels={"weight": jnp.ones(3)})
  loss, values = loss_fn("d3po", beta=0.1, clip_range=0.1)(PARAMS, FROZEN, made, jax.random.key(0))
  margin = np.array([0.05 + 0.03, 1.0, 0.02 - 0.04])
  np.testing.assert_allclose(values["preference/margin"], margin, rtol=2e-3, atol=2e-3)
  clipped = np.array([0.08, np.log(1.1) - np.log(0.9), -0.02])
  np.testing.assert_allclose(loss, np.log1p(np.exp(-0.1 * clipped)), rtol=3e-4)
  np.testing.assert_array_equal(values["preference/clip_frac"], [0.0, 1.0, 0.0])


def test_prompts_of_a_pair_are_not_mixed_up():
  """Changing the third prompt changes the third loss alone."""
  batch = toy_policy.pairs_batch()
  text = batch.cond["text"].at[2].add(0.5)
  fn, key = loss_fn("dpo", beta=50.0, time_weight="half", num_draws=1), jax.random.key(6)
  before, _ = fn(PARAMS, FROZEN, batch, key)
  after, _ = fn(PARAMS, FROZEN, dataclasses.replace(batch, cond={"text": text}), key)
  assert (before[:2] == after[:2]).all() and before[2] != after[2]


def test_an_unknown_time_weight_is_named():
  with pytest.raises(ValueError, match="expected one of half, elbo, got 'snr'"):
    methods.make("dpo", PIPELINE, beta=1.0, time_weight="snr", num_draws=1)


def test_any_loss_on_log_ratios_makes_a_method():
  """The loss, the estimator and the time weight are chosen independently."""
  square = lambda w, l, p: jnp.square(w) + jnp.square(l)  # noqa: E731
  batch = toy_policy.pairs_batch()
  key = jax.random.key(7)
  elbo, half = (
    diffusion_dpo.make(PIPELINE, square, time_weight=name, num_draws=1).loss(
      PARAMS, FROZEN, batch, key
    )[1]
    for name in ("elbo", "half")
  )
  num_levels = PIPELINE.levels.num_steps
  level = (jax.random.uniform(jax.random.split(key)[0], (3, 1))[:, 0] * num_levels).astype(int)
  weight = log_ratios.make_elbo(PIPELINE.levels.num_steps)(
    PIPELINE.levels[level], batch.x_0[:, 0], PIPELINE.prediction_type
  )
  np.testing.assert_allclose(
    elbo["preference/margin"], 2.0 * weight * half["preference/margin"], rtol=1e-4
  )


def test_draws_are_spread_over_the_levels_and_averaged_before_the_loss():
  """1000 draws of a pair see every level once, so that only the noise is left to chance."""
  batch = toy_policy.pairs_batch()
  margins = []
  for num_draws, key in ((1, 0), (1, 1), (1000, 2), (1000, 3)):
    fn = loss_fn("dpo", beta=50.0, time_weight="half", num_draws=num_draws)
    loss, values = fn(PARAMS, FROZEN, batch, jax.random.key(key))
    assert loss.shape == (3,)
    margins.append(values["preference/margin"])
    expected = np.log1p(np.exp(-50.0 * margins[-1])) + (1 - batch.labels["p"]) * 50.0 * margins[-1]
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
  one, other, many, more = margins
  assert np.abs(many - more).max() < 0.1 * np.abs(one - other).max()
  with pytest.raises(ValueError, match=r"num_draws: expected at least 1, got 0"):
    methods.make("dpo", PIPELINE, beta=1.0, time_weight="half", num_draws=0)
