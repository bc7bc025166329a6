"""Methods on finished samples and moving windows: KTO, online DPO, NFT, RWR, MixGRPO."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy
from toy_policy import FROZEN, OLD, PARAMS, PIPELINE, REFERENCE, TABLE

from jaxalign import methods
from jaxalign.diffusion import forward
from jaxalign.labels import advantages

KEY = jax.random.key(2)
ESTIMATOR = {"time_weight": "half", "num_draws": 1}
KTO = {"beta": 50.0, "time_weight": "half", "weight_good": 2.0, "weight_bad": 1.0}
NFT = {"mix": 0.5, "advantage_limit": 5.0, "decay_rate": 0.001, "decay_max": 0.5}


@functools.cache
def loss_fn(name, **kwargs):
  return jax.jit(methods.make(name, PIPELINE, **kwargs).loss)


def nft(**changes):
  kwargs = {**NFT, "reference_weight": 0.0, "advantage": toy_policy.ADVANTAGE, **changes}
  return methods.make("nft", PIPELINE, **kwargs)


def gradient(loss, variables, batch):
  return jax.grad(lambda v: loss(v, FROZEN, batch, KEY)[0].sum())(variables)


# ---- Diffusion-KTO


def test_kto_at_the_reference_is_half_the_weight_and_z_is_zero():
  batch = toy_policy.BATCHES["kto"]()
  loss, values = loss_fn("kto", **KTO)(REFERENCE, FROZEN, batch, KEY)
  np.testing.assert_allclose(loss, [1.0, 0.5, 1.0], rtol=1e-6)
  np.testing.assert_allclose(values["preference/accuracy"], np.full(3, 0.5))
  assert not values["preference/reference_point"].any()


def test_a_step_of_kto_raises_good_samples_and_lowers_bad_ones():
  batch = toy_policy.BATCHES["kto"]()
  fn = loss_fn("kto", **KTO)
  slope = gradient(fn, REFERENCE, batch)
  moved = jax.tree.map(lambda p, g: p - 1e-3 * g, REFERENCE, slope)
  _, values = fn(moved, FROZEN, batch, KEY)
  good, log_ratio = batch.labels["good"], values["preference/log_ratio"]
  assert (2 * good * log_ratio).sum() - ((1 - good) * log_ratio).sum() > 0


def test_the_reference_point_of_kto_is_the_mean_of_the_batch_and_never_negative():
  batch = toy_policy.BATCHES["kto"]()
  for variables in (PARAMS, jax.tree.map(lambda r, p: 2 * r - p, REFERENCE, PARAMS)):
    _, values = loss_fn("kto", **KTO)(variables, FROZEN, batch, KEY)
    expected = max(0.0, float(values["preference/log_ratio"].mean()))
    found = values["preference/reference_point"]
    np.testing.assert_allclose(found, np.full(3, expected), atol=1e-7)


# ---- online DPO


def test_online_dpo_is_dpo_on_pairs_of_the_policy_and_of_ties_nothing():
  batch = toy_policy.online_pairs_batch()
  kwargs = {"beta": 50.0, **ESTIMATOR}
  online, _ = loss_fn("online_dpo", temperature=1.0, refresh=0, **kwargs)(
    PARAMS, FROZEN, batch, KEY
  )
  stored, _ = loss_fn("dpo", **kwargs)(PARAMS, FROZEN, batch, KEY)
  np.testing.assert_allclose(online, np.array([1.5, 1.5, 0.0]) * stored, rtol=1e-6)


@pytest.mark.parametrize("temperature, expected", [
  (0.0, [1, 1]), (2.0, [1 / (1 + np.exp(-2)), 0.5])
])
def test_labels_of_online_dpo_are_choices_of_the_annotator(temperature, expected):
  data = methods.make(
    "online_dpo", PIPELINE, beta=1.0, temperature=temperature, refresh=0, **ESTIMATOR
  ).data
  _, labels = data.label(None, toy_policy.scores_of([[1.0, 5.0, 3.0], [2.0, 2.0, 2.0]]), KEY)
  assert labels.samples.tolist() == [[1, 0], [3, 3]] and data.by == "sample"
  np.testing.assert_allclose(labels.values["p"], expected, rtol=1e-6)
  np.testing.assert_allclose(labels.values["weight"], [2.0, 0.0])


def test_a_refreshed_reference_is_the_policy_of_that_iteration():
  made = functools.partial(methods.make, "online_dpo", PIPELINE, beta=1.0, temperature=0.0)
  assert made(refresh=0, **ESTIMATOR).copies == {}
  decay = made(refresh=3, **ESTIMATOR).copies["reference"]
  assert [decay(i) for i in range(7)] == [1, 1, 0, 1, 1, 0, 1]


# ---- DiffusionNFT


def test_nft_is_moved_by_optimality_alone_where_old_and_new_are_one():
  """Of an average sample nothing is learned; of a good one what of a bad one is unlearned."""
  loss = jax.jit(nft().loss)
  frozen = {**FROZEN, "old": PARAMS}

  def slope(value):
    batch = toy_policy.finished_batch(advantages=[value] * 3)
    return jax.grad(lambda v: loss(v, frozen, batch, KEY)[0].sum())(PARAMS)

  good, average, bad = slope(5.0), slope(0.0), slope(-5.0)
  for name in PARAMS:
    np.testing.assert_allclose(average[name], np.zeros_like(average[name]), atol=1e-5)
    np.testing.assert_allclose(good[name], -bad[name], rtol=1e-4)
    assert np.abs(good[name]).max() > 0.01
  more = slope(50.0)  # beyond the limit
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), good, more)


def test_nft_stays_near_the_reference_at_its_weight():
  batch = toy_policy.finished_batch(advantages=[0.0] * 3)
  frozen = {**FROZEN, "old": PARAMS}
  alone, values = nft().loss(PARAMS, frozen, batch, KEY)
  held, _ = nft(reference_weight=0.3).loss(PARAMS, frozen, batch, KEY)
  np.testing.assert_allclose(held - alone, 0.3 * values["reference/drift"], rtol=1e-3)
  assert (values["reference/drift"] > 0).all() and not values["nft/contrast"].any()


def test_the_old_policy_of_nft_follows_ever_more_slowly():
  method = nft()
  assert method.data.sampled_by == "old"
  assert [method.copies["old"](i) for i in (0, 100, 500, 900)] == [0.0, 0.1, 0.5, 0.5]
  batch = toy_policy.BATCHES["nft"]()
  found = [nft().loss(PARAMS, {**FROZEN, "old": old}, batch, KEY)[0] for old in (OLD, PARAMS)]
  assert np.abs(found[0] - found[1]).min() > 1e-4


# ---- reward-weighted regression


def test_rwr_with_equal_weights_is_the_loss_of_diffusion_training():
  batch = toy_policy.finished_batch(weight=[1.0, 1.0, 1.0])
  loss, values = loss_fn("rwr", gamma=1.0, refresh=1)(PARAMS, FROZEN, batch, KEY)
  row, eps = forward.draw(KEY, PIPELINE.levels, 3, toy_policy.SHAPE)
  x_t = row.alpha_t[:, None, None, None] * batch.x_0 + row.sigma_t[:, None, None, None] * eps
  prediction = toy_policy.denoise(PARAMS, x_t, row.t, batch.cond)
  expected = jnp.mean(jnp.square(prediction - eps), axis=(1, 2, 3))  # the toy predicts noise
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(values["denoising/error"], expected, rtol=1e-5)
  weighted = dataclasses.replace(batch, labels={"weight": jnp.array([0.0, 3.0, 0.5])})
  loss, _ = loss_fn("rwr", gamma=1.0, refresh=1)(PARAMS, FROZEN, weighted, KEY)
  np.testing.assert_allclose(loss, np.array([0.0, 3.0, 0.5]) * expected, rtol=1e-5)


def test_weights_of_rwr_are_over_all_samples_of_an_iteration():
  data = methods.make("rwr", PIPELINE, gamma=float(np.log(2)), refresh=2).data
  _, labels = data.label(None, toy_policy.scores_of([[0.0, 1.0], [2.0, 3.0]]), KEY)
  np.testing.assert_allclose(labels.values["weight"], np.array([1, 2, 4, 8]) * 4 / 15, rtol=1e-6)
  np.testing.assert_allclose(labels.metrics["weight/effective"], 15**2 / 85, rtol=1e-6)
  data = methods.make("rwr_sparse", PIPELINE, share=0.5, refresh=2).data
  _, labels = data.label(None, toy_policy.scores_of([[0.0, 1.0], [2.0, 3.0]]), KEY)
  assert labels.values["weight"].tolist() == [0, 0, 2, 2]
  with pytest.raises(ValueError, match=r"share: expected above 0, up to 1, got 0"):
    methods.make("rwr_sparse", PIPELINE, share=0.0, refresh=1)


def test_what_samples_for_rwr_is_refreshed_when_it_is_due():
  decays = {
    refresh: methods.make("rwr", PIPELINE, gamma=1.0, refresh=refresh).copies["old"]
    for refresh in (0, 1, 2)
  }
  assert [decays[0](i) for i in range(4)] == [1, 1, 1, 1]
  assert [decays[1](i) for i in range(4)] == [0, 0, 0, 0]
  assert [decays[2](i) for i in range(4)] == [1, 0, 1, 0]


# ---- RAFT


def test_raft_keeps_the_best_of_each_record_and_trains_on_no_other():
  data = methods.make("raft", PIPELINE, keep=2, refresh=1).data
  _, labels = data.label(None, toy_policy.scores_of([[1.0, 3.0, 3.0], [0.0, -1.0, 5.0]]), KEY)
  assert labels.samples.tolist() == [1, 2, 5, 3]
  assert labels.values["weight"].tolist() == [1, 1, 1, 1]
  np.testing.assert_allclose(labels.metrics["reward/kept"], 11 / 4)
  batch = toy_policy.BATCHES["raft"]()
  loss, _ = loss_fn("raft", keep=1, refresh=1)(PARAMS, FROZEN, batch, KEY)
  expected, _ = loss_fn("rwr", gamma=1.0, refresh=1)(PARAMS, FROZEN, batch, KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
    methods.make("raft", PIPELINE, keep=0, refresh=1)
  with pytest.raises(ValueError, match=r"keep: expected fewer than config.* = 3, got 3"):
    methods.make("raft", PIPELINE, keep=3, refresh=1).data.label(
      None, toy_policy.scores_of([[1.0, 3.0, 3.0]]), KEY
    )


# ---- MixGRPO


def mix_grpo(pipeline=PIPELINE, **changes):
  kwargs = {"clip_range": 0.1, "window_size": 2, "window_stride": 1, "window_every": 2}
  return methods.make(
    "mix_grpo", pipeline, **{"advantage": toy_policy.ADVANTAGE, **kwargs, **changes}
  )


def test_the_window_moves_along_the_steps_with_noise_and_starts_again():
  """Three of four steps have noise here: the last one has none."""
  table = dataclasses.replace(TABLE, noise_scale=np.array([1, 1, 1, 0], np.float32))
  ends = PIPELINE._replace(table=table)
  window = mix_grpo(pipeline=ends).data.window
  first, second = [1, 1, 0, 0], [0, 1, 1, 0]
  assert [window(i).tolist() for i in range(6)] == [first, first, second, second, first, first]
  whole = mix_grpo(pipeline=ends, window_size=3, window_every=1).data.window
  assert all(whole(i).tolist() == [1, 1, 1, 0] for i in range(3))
  leaps = mix_grpo(pipeline=ends, window_size=1, window_stride=2, window_every=1).data.window
  assert [np.flatnonzero(leaps(i)).tolist() for i in range(3)] == [[0], [2], [0]]


@pytest.mark.parametrize("field, value, expected", [
  ("window_size", 5, "1 to 4, the steps with noise"),
  ("window_size", 0, "1 to 4"),
  ("window_stride", 0, "1 to 4"),
  ("window_every", 0, "at least 1"),
])
def test_a_window_that_does_not_fit_is_refused(field, value, expected):
  with pytest.raises(ValueError, match=rf"config\.method\.{field}: expected {expected}"):
    mix_grpo(**{field: value})


def test_a_kl_and_advantages_by_reward_do_not_go_together():
  apart = advantages.make("group", limit=5.0, per_reward=True, epsilon=1e-4, ddof=0)
  assert mix_grpo(advantage=apart).data.kl_weight == 0.0
  with pytest.raises(ValueError, match=r"kl_weight: expected 0 with config\.advantage\.per_reward"):
    methods.make("ddpo_sf", PIPELINE, kl_weight=0.1, advantage=apart)
