"""The contract of every method, on a batch of what it learns from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy
from toy_policy import FROZEN, PARAMS, PIPELINE, TABLE

from jaxalign import methods
from jaxalign.data import examples

# What each method of METHODS is made with; a new method is added here and gets every test below.
KWARGS = {
  "ddpo": {"clip_range": 1e-4, "kl_weight": 0.1},
  "ddpo_sf": {"kl_weight": 0.1},
  "dpo": {"beta": 100.0, "time_weight": "half", "num_draws": 1},
  "ipo": {"tau": 5.0, "time_weight": "half", "num_draws": 1},
  "d3po": {"beta": 0.1, "clip_range": 0.1},
  "draft": {"num_grad_steps": 2, "kl_weight": 0.01},
  "draft_lv": {"num_noises": 2},
  "align_prop": {"mean_grad_steps": 2.0, "std_grad_steps": 1.0, "kl_weight": 0.01},
  "refl": {"step_range": (0.5, 1.0), "target": 2.0},
  "kto": {"beta": 2.0, "time_weight": "half", "weight_good": 1.0, "weight_bad": 1.5},
  "online_dpo": {
    "beta": 5.0, "temperature": 1.0, "refresh": 3, "time_weight": "half", "num_draws": 2
  },
  "nft": {
    "mix": 0.5, "advantage_limit": 5.0, "reference_weight": 0.01, "decay_rate": 0.1,
    "decay_max": 0.5,
  },
  "mix_grpo": {
    "clip_range": 0.1, "window_size": 2, "window_stride": 1, "window_every": 2
  },
  "raft": {"keep": 1, "refresh": 2},
  "rwr": {"gamma": 0.5, "refresh": 1},
  "rwr_sparse": {"share": 0.5, "refresh": 2},
}
WITH_ADVANTAGE = ("ddpo", "ddpo_sf", "mix_grpo", "nft")
KEY = jax.random.key(11)


def make(name, **changes):
  given = {"advantage": toy_policy.ADVANTAGE} if name in WITH_ADVANTAGE else {}
  return methods.make(name, PIPELINE, **{**given, **KWARGS[name], **changes})


@functools.cache
def loss_and_grad_fn(name, compiled=True):
  method = make(name)

  def loss_and_grad(params, frozen, batch, key):
    def total(params):
      loss, values = method.loss(params, frozen, batch, key)
      return loss.sum(), (loss, values)

    return jax.value_and_grad(total, has_aux=True)(params)

  return jax.jit(loss_and_grad) if compiled else loss_and_grad


def batch_of(name):
  return toy_policy.BATCHES[name]()


def loss_and_grad(name, params=PARAMS, batch=None, key=KEY, compiled=True):
  batch = batch_of(name) if batch is None else batch
  return loss_and_grad_fn(name, compiled)(params, FROZEN, batch, key)


def test_every_method_is_under_test():
  assert set(KWARGS) == set(toy_policy.BATCHES) == set(methods.METHODS)


@pytest.mark.parametrize("noise, refused", [
  ((0, 0, 0, 0), {"draft": (1, 2, 0), "align_prop": True}),
  ((1, 1, 1, 0), {"draft": (1,), "align_prop": False}),
  ((1, 0, 0, 0), {"draft": (1, 2), "align_prop": True}),  # it never reaches the first step
])
def test_a_weight_of_a_kl_that_no_differentiated_step_has_is_refused(noise, refused):
  table = dataclasses.replace(TABLE, noise_scale=np.array(noise, np.float32))
  pipeline = PIPELINE._replace(table=table)
  align_prop = {"mean_grad_steps": 2.0, "std_grad_steps": 1.0}
  cases = [("draft", {"num_grad_steps": K}, K in refused["draft"]) for K in (1, 2, 0)]
  for name, kwargs, bad in [*cases, ("align_prop", align_prop, refused["align_prop"])]:
    methods.make(name, pipeline, **kwargs, kl_weight=0.0)
    if bad:
      with pytest.raises(ValueError, match=r"kl_weight: expected 0, because no step .* got 0.1"):
        methods.make(name, pipeline, **kwargs, kl_weight=0.1)
    else:
      methods.make(name, pipeline, **kwargs, kl_weight=0.1)


@pytest.mark.parametrize("name", methods.METHODS)
def test_its_data_is_of_a_kind_that_has_a_feed(name):
  assert isinstance(make(name).data, methods.Rollouts | methods.Stored | methods.Records)


@pytest.mark.parametrize("name", methods.METHODS)
def test_loss_and_metrics_are_finite_and_one_per_example(name):
  (_, (loss, values)), grad = loss_and_grad(name)
  examples = 5 if isinstance(batch_of(name), methods.Steps) and name != "d3po" else 3
  assert loss.shape == (examples,) and loss.dtype == jnp.float32 and jnp.isfinite(loss).all()
  assert values
  for metric in values.values():
    assert metric.shape == (examples,) and jnp.isfinite(metric).all()
  for leaf in jax.tree.leaves(grad):
    assert jnp.isfinite(leaf).all() and jnp.any(leaf != 0)


@pytest.mark.parametrize("name", methods.METHODS)
def test_jit_equals_no_jit(name):
  plain = loss_and_grad(name, compiled=False)
  compiled = loss_and_grad(name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-6), plain, compiled)


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_same_key_gives_the_same_loss(name):
  jax.tree.map(np.testing.assert_array_equal, loss_and_grad(name), loss_and_grad(name))


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_small_step_down_the_gradient_lowers_the_loss(name):
  """On the same batch and the same key; against the clipping of DDPO and D3PO, a tiny one."""
  (before, _), grad = loss_and_grad(name)
  norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grad)))
  size = 1e-3 / norm
  moved = jax.tree.map(lambda leaf, g: leaf - size * g, PARAMS, grad)
  (after, _), _ = loss_and_grad(name, moved)
  assert after < before


def test_unknown_names_are_told_with_the_known():
  with pytest.raises(ValueError, match=r"unknown method 'ddppo'; did you mean \"ddpo\"(.|\n)*d3po"):
    methods.make("ddppo", PIPELINE)


def test_a_misspelt_argument_is_named():
  with pytest.raises(ValueError, match=r"config\.method 'dpo': .*valid keys: beta"):
    methods.make("dpo", PIPELINE, bta=1.0, time_weight="half", num_draws=1)


@pytest.mark.parametrize("name", ["draft", "draft_lv", "align_prop", "refl"])
def test_direct_methods_want_a_differentiable_reward(name):
  with pytest.raises(ValueError, match="run on the device"):
    methods.make(name, PIPELINE._replace(reward=None), **KWARGS[name])


def prefer_winners(pipeline, *, strength):
  """A method from outside the package: the hinge loss on denoising errors."""
  from jaxalign.methods import diffusion_dpo

  hinge = lambda w, l, p: jnp.maximum(0.0, 1.0 - strength * (w - l))  # noqa: E731
  method = diffusion_dpo.make(pipeline, hinge, time_weight="half", num_draws=1)
  return method._replace(data=methods.Stored(examples.choices))


def not_a_method(pipeline):
  return pipeline


def test_a_method_from_outside_is_named_by_its_function():
  method = methods.make(f"{__name__}:prefer_winners", PIPELINE, strength=3.0)
  batch = toy_policy.pairs_batch()
  loss, _ = method.loss(REFERENCE_PARAMS, FROZEN, batch, KEY)
  np.testing.assert_allclose(loss, np.ones(3), rtol=1e-6)  # hinge at the reference
  with pytest.raises(ValueError, match=r"missing a required .*argument: 'strength'"):
    methods.make(f"{__name__}:prefer_winners", PIPELINE, strenth=3.0)
  with pytest.raises(ValueError, match=r"to return a jaxalign\.methods\.Method, got Pipeline"):
    methods.make(f"{__name__}:not_a_method", PIPELINE)
  with pytest.raises(ValueError, match='has no "prefer_winer"; did you mean'):
    methods.make(f"{__name__}:prefer_winer", PIPELINE)


REFERENCE_PARAMS = FROZEN["reference"]
