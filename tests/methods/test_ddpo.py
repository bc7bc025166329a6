"""DDPO's identities and its updates, on a denoiser one can see through."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import shipped
from toy_policy import (
  ADVANTAGE,
  ADVANTAGES,
  FROZEN,
  KERNEL,
  NUM_IMAGES,
  NUM_STEPS,
  PARAMS,
  PIPELINE,
  SHAPE,
  TABLE,
  select_steps,
  selection,
  trajectories,
  transitions_of,
)

from jaxalign import methods
from jaxalign.diffusion.kernel import mean_over_latents
from jaxalign.training import update
from jaxalign.training.feeds import online
from jaxalign.training.state import init_state

KWARGS = {"ddpo": {"clip_range": 1e-4, "kl_weight": 0.0}, "ddpo_sf": {"kl_weight": 0.0}}
SELECT = online.select_fn(methods.Rollouts(None, by="step"))


def make(name, **changes):
  return methods.make(name, PIPELINE, advantage=ADVANTAGE, **{**KWARGS[name], **changes})


def batch_of(image, i, advantages=None, **changes):
  batch = select_steps(transitions_of(), selection(image, i))
  if advantages is not None:
    changes["labels"] = {"advantages": advantages}
  return dataclasses.replace(batch, **changes)


def batch_anywhere():
  return batch_of([5, 0, 3, 2, 2], [0, 3, 1, 2, 0])


@functools.cache  # one compilation for each method and batch shape
def loss_and_grad_fn(name, **changes):
  method = make(name, **changes)

  def loss_and_grad(params, batch):
    def total(params):
      loss, values = method.loss(params, FROZEN, batch, jax.random.key(0))
      return loss.sum(), (loss, values)

    return jax.value_and_grad(total, has_aux=True)(params)

  return shipped.jit(loss_and_grad)


def loss_and_grad(name, batch, params=PARAMS, **changes):
  """`((sum of loss, (loss [B], metrics)), gradient of the sum)`."""
  return loss_and_grad_fn(name, **changes)(params, batch)


@pytest.mark.parametrize("name", KWARGS)
def test_no_gradient_to_what_was_sampled(name):
  batch = batch_anywhere()

  def total(old_log_prob, x_s, advantages):
    changed = batch_of(
      [5, 0, 3, 2, 2], [0, 3, 1, 2, 0], log_prob=old_log_prob, x_s=x_s, advantages=advantages
    )
    return make(name).loss(PARAMS, FROZEN, changed, jax.random.key(0))[0].sum()

  given = (batch.log_prob, batch.x_s, batch.labels["advantages"])
  for leaf in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*given):
    assert not leaf.any()


@pytest.mark.parametrize("name", KWARGS)
def test_an_advantage_of_zero_teaches_nothing(name):
  batch = batch_anywhere()
  batch = dataclasses.replace(batch, labels={"advantages": jnp.zeros(5)})
  _, grad = loss_and_grad(name, batch)
  assert not any(leaf.any() for leaf in jax.tree.leaves(grad))


# ---- the log-probability


@jax.jit
def distribution(params, batch):
  return KERNEL.moments(params, batch.x_t, batch.row, batch.cond)


def test_the_log_probability_is_the_mean_over_latents_by_hand():
  # mean of (0, 1, ..., 29) is 14.5; the sum would be 435.
  elementwise = jnp.arange(30.0).reshape(1, *SHAPE)
  np.testing.assert_allclose(mean_over_latents(elementwise), [14.5])
  np.testing.assert_allclose(mean_over_latents(jnp.ones((4, 7))), np.ones(4))


def test_the_loss_of_one_step_by_hand():
  """x_s one standard deviation above its mean everywhere: log p = -1/2 - log std - log(2 pi)/2."""
  batch = batch_of([1], [2])
  mean, std = distribution(PARAMS, batch)
  log_prob = -0.5 - np.log(float(std.squeeze())) - 0.5 * np.log(2 * np.pi)
  batch = batch_of([1], [2], x_s=mean + std, advantages=jnp.array([2.0]))
  (_, (loss, _)), _ = loss_and_grad("ddpo_sf", batch)
  np.testing.assert_allclose(loss, [-2.0 * log_prob], rtol=1e-5)
  # With log p_old = log p - log 1.5 the ratio is 1.5 whatever the number of latents, 30 here.
  batch = batch_of(
    [1], [2], x_s=mean + std, log_prob=jnp.array([log_prob - np.log(1.5)], jnp.float32),
    advantages=jnp.array([-2.0]),
  )  # fmt: skip
  (_, (loss, values)), _ = loss_and_grad("ddpo", batch, clip_range=0.1)
  np.testing.assert_allclose(values["policy/ratio"], [1.5], rtol=1e-5)
  np.testing.assert_allclose(loss, [3.0], rtol=1e-5)  # -min(1.5 * -2, 1.1 * -2)


@pytest.mark.parametrize(
  "advantage, log_ratio, loss, has_gradient",
  [
    (1.0, 0.5, -1.1, False),  # far up and good: clipped
    (1.0, -0.5, -np.exp(-0.5), True),  # far down and good: a plain clamp would lose this gradient
    (-1.0, 0.5, np.exp(0.5), True),  # far up and bad: and this one
    (-1.0, -0.5, 0.9, False),  # far down and bad: clipped
    (1.0, 0.05, -np.exp(0.05), True),  # inside
  ],
)
def test_the_surrogate_is_pessimistic_and_no_plain_clamp(advantage, log_ratio, loss, has_gradient):
  batch = batch_of([4], [1], advantages=jnp.array([advantage]))
  log_prob = batch.log_prob  # on-policy: that of PARAMS
  batch = batch_of(
    [4], [1], advantages=jnp.array([advantage]), log_prob=log_prob - jnp.float32(log_ratio)
  )
  (actual, (_, values)), grad = loss_and_grad("ddpo", batch, clip_range=0.1)
  np.testing.assert_allclose(actual, loss, rtol=1e-5)
  assert any(bool(leaf.any()) for leaf in jax.tree.leaves(grad)) == has_gradient
  np.testing.assert_array_equal(values["policy/clip_frac"], [float(abs(log_ratio) > 0.1)])


# ---- on-policy identities, through rollout, selection and loss


def all_transitions(slices, microbatch):
  """Every transition once, in a fixed shuffle."""
  pairs = np.random.default_rng(0).permutation(NUM_IMAGES * NUM_STEPS).astype(np.int32)
  shape = (slices, microbatch)
  return selection((pairs // NUM_STEPS).reshape(shape), (pairs % NUM_STEPS).reshape(shape))


def test_selection_takes_the_right_transitions():
  rolled, cond = trajectories()
  batch = batch_of([5, 0], [2, 3])
  for row, (image, i) in enumerate([(5, 2), (0, 3)]):
    j, place = divmod(image, 3)  # in two microbatches of three
    np.testing.assert_array_equal(batch.x_t[row], rolled.x[i, j, place])
    np.testing.assert_array_equal(batch.x_s[row], rolled.x[i + 1, j, place])
    assert batch.log_prob[row] == rolled.log_prob[i, j, place]
    assert batch.labels["advantages"][row] == ADVANTAGES[image] and batch.row.t[row] == TABLE.t[i]
    np.testing.assert_array_equal(batch.cond.cond["text"][row], cond.cond["text"][j, place])
  assert batch.cond.uncond["text"].shape == (1, 2)  # shared, so not gathered


def test_collect_stacks_the_microbatches():
  rolled, cond = trajectories()
  assert rolled.x.shape == (NUM_STEPS + 1, 2, NUM_IMAGES // 2, *SHAPE)
  assert rolled.log_prob.shape == (NUM_STEPS, 2, NUM_IMAGES // 2)
  assert cond.cond["text"].shape == (2, NUM_IMAGES // 2, 2)
  second = jax.random.normal(jax.random.key(1), (3, 2)) * 0.1
  np.testing.assert_allclose(cond.cond["text"][1], second, rtol=1e-6)


@shipped.jit
def score(params, batch):
  return KERNEL.log_prob(
    params, batch.x_t, batch.x_s, batch.row, batch.cond, mean_over_latents
  )


def test_the_ratio_on_policy_is_exactly_one():
  """In slices as large as the microbatches of the rollout, which is what a plan makes them."""
  moved = {**PARAMS, "w": PARAMS["w"] + 0.01}
  chosen = all_transitions(8, 3)
  for image, i in zip(chosen.example, chosen.i, strict=True):
    batch = batch_of(image, i)
    np.testing.assert_array_equal(score(PARAMS, batch), batch.log_prob)
    # In the program of the loss XLA may contract mean and difference, and then the new
    # log-probability is never rounded: the gap is below an ulp and the ratio a neighbour of 1.
    (_, (_, values)), _ = loss_and_grad("ddpo", batch)
    np.testing.assert_allclose(values["policy/ratio"], np.ones(3), rtol=0, atol=1.3e-7)
    assert values["policy/log_prob_gap"].max() < 1.3e-7 and not values["policy/clip_frac"].any()
    (_, (_, values)), _ = loss_and_grad("ddpo", batch, moved)
    assert (np.abs(values["policy/ratio"] - 1) > 1e-6).all()


def test_while_the_policy_is_the_one_that_sampled_the_ratio_is_one_by_construction():
  """Whatever the rollout's roundings; the gap that is logged is the true one."""
  batch = batch_of([5, 0, 2], [2, 3, 0])
  off = dataclasses.replace(batch, log_prob=batch.log_prob + jnp.array([0.0, 0.3, -0.2]))
  fresh = dataclasses.replace(off, fresh=jnp.ones(3, bool))
  (_, (_, values)), grad = loss_and_grad("ddpo", fresh)
  np.testing.assert_array_equal(values["policy/ratio"], np.ones(3, np.float32))
  assert not values["policy/clip_frac"].any() and not values["policy/approx_kl"].any()
  np.testing.assert_allclose(values["policy/log_prob_gap"], [0.0, 0.3, 0.2], atol=1e-6)
  # The gradient is REINFORCE's, which no old log-probability enters.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    grad,
    loss_and_grad("ddpo_sf", batch)[1],
  )
  (_, (_, values)), _ = loss_and_grad("ddpo", off)  # in later updates the rollout's counts
  np.testing.assert_allclose(values["policy/ratio"], np.exp([0.0, -0.3, 0.2]), rtol=1e-5)


def test_on_policy_the_gradients_of_both_estimators_are_equal():
  chosen = all_transitions(8, 3)
  for image, i in zip(chosen.example, chosen.i, strict=True):
    grads = [loss_and_grad(name, batch_of(image, i))[1] for name in ("ddpo", "ddpo_sf")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *grads)


def test_the_gradient_is_that_of_the_gaussian_in_closed_form():
  """d log p / d b = mean over latents of (x_s - mean) / std^2 * d mean / d b; linear in b."""
  batch = batch_of([3], [1])
  mean, std = distribution(PARAMS, batch)
  bumped = {**PARAMS, "b": PARAMS["b"] + jnp.array([1.0, 0.0])}
  mean_bumped, _ = distribution(bumped, batch)
  expected = np.mean((batch.x_s - mean) / std**2 * (mean_bumped - mean))
  _, grad = loss_and_grad("ddpo_sf", batch)
  advantage = float(batch.labels["advantages"][0])
  np.testing.assert_allclose(grad["b"][0], -advantage * expected, rtol=2e-3)


# ---- updates


def full(params, base):
  return {**base, **params}


SGD = optax.sgd(1.0)


@functools.cache
def update_fn():
  return update.jit_update(make("ddpo"), SGD, full, SELECT)


def updated(selected):
  return update_fn()(init_state(PARAMS, SGD), FROZEN, transitions_of(), selected, 0, 0, 0)


def test_slices_add_up_to_one_big_slice():
  big, big_values = updated(all_transitions(1, 24))
  for slices in (4, 24):
    small, values = updated(all_transitions(slices, 24 // slices))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), small, big)
    np.testing.assert_allclose(values["grad/norm"], big_values["grad/norm"], rtol=1e-5)
    assert values["loss/total"].shape == (slices, 24 // slices)
    for metric, value in values.items():
      np.testing.assert_allclose(
        np.ravel(value), np.ravel(big_values[metric]), rtol=1e-5, atol=1e-6, err_msg=metric
      )


def test_an_update_is_the_mean_gradient_times_the_rate():
  state, values = updated(all_transitions(4, 6))
  everything = all_transitions(1, 24)
  _, grad = loss_and_grad("ddpo", batch_of(everything.example[0], everything.i[0]))
  for name, start in PARAMS.items():
    step = grad[name] / 24  # of a sum over 24 transitions
    np.testing.assert_allclose(state.params[name], start - step, rtol=1e-5, atol=1e-6)
  norm = np.sqrt(sum(float(jnp.sum((g / 24) ** 2)) for g in jax.tree.leaves(grad)))
  np.testing.assert_allclose(values["grad/norm"], norm, rtol=1e-5)


def test_the_state_is_donated_and_the_start_is_not_lost():
  state = init_state(PARAMS, SGD)
  arguments = (FROZEN, transitions_of(), all_transitions(4, 6), 0, 0, 0)
  jax.block_until_ready(update_fn()(state, *arguments))
  assert state.params["b"].is_deleted() and not PARAMS["b"].is_deleted()
