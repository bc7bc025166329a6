"""Classifier-free guidance: identities, the doubled batch, what is evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.diffusion import guidance

B = 3


def make_inputs():
  rng = np.random.default_rng(0)
  x_t = jnp.array(rng.normal(size=(B, 5, 3, 2)), jnp.float32)
  cond = {"text": jnp.array(rng.normal(size=(B, 4, 2)), jnp.float32), "pooled": jnp.arange(3.0)}
  uncond = {"text": jnp.array(rng.normal(size=(1, 4, 2)), jnp.float32), "pooled": jnp.ones(1)}
  return x_t, jnp.array([10.0, 20.0, 30.0]), guidance.Guided(cond, uncond)


class Network:
  """Mixes everything it is given, within an example only, and records the batch sizes it saw."""

  def __init__(self):
    self.batches = []

  def __call__(self, params, x_t, t, cond):
    self.batches.append(x_t.shape[0])
    text = cond["text"].mean(1)[:, None, None]
    return params["w"] * x_t * text + (t * cond["pooled"])[:, None, None, None]


PARAMS = {"w": jnp.float32(0.7)}


def branches(x_t, t, cond):
  network = Network()
  uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), cond.uncond, cond.cond)
  return network(PARAMS, x_t, t, uncond), network(PARAMS, x_t, t, cond.cond)


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.5])
def test_is_the_combination_of_two_separate_evaluations(scale):
  x_t, t, cond = make_inputs()
  network = Network()
  ours = guidance.classifier_free(network, scale)(PARAMS, x_t, t, cond)
  uncond_prediction, cond_prediction = branches(x_t, t, cond)
  expected = (1 - scale) * uncond_prediction + scale * cond_prediction
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
  assert network.batches == [2 * B]


def test_scale_one_evaluates_the_conditional_branch_only():
  x_t, t, cond = make_inputs()
  network = Network()
  ours = guidance.classifier_free(network, 1.0)(PARAMS, x_t, t, cond)
  np.testing.assert_array_equal(ours, branches(x_t, t, cond)[1])
  assert network.batches == [B]


def test_equal_branches_make_the_scale_irrelevant():
  x_t, t, cond = make_inputs()
  same = guidance.Guided(cond.cond, cond.cond)
  ours = guidance.classifier_free(Network(), 7.5)(PARAMS, x_t, t, same)
  np.testing.assert_array_equal(ours, branches(x_t, t, cond)[1])


def test_gradient_flows_through_both_branches():
  x_t, t, cond = make_inputs()
  guided = guidance.classifier_free(Network(), 3.0)
  ours = jax.grad(lambda p: guided(p, x_t, t, cond).sum())(PARAMS)["w"]
  text = cond.uncond["text"].mean(1) + 3.0 * (
    cond.cond["text"].mean(1) - cond.uncond["text"].mean(1)
  )
  np.testing.assert_allclose(ours, (x_t * text[:, None, None]).sum(), rtol=1e-4)


def test_text_and_image_by_three_separate_evaluations():
  x_t, t, cond = make_inputs()
  image = x_t + 1.0
  cond = guidance.Guided(
    {**cond.cond, "image": image}, {**cond.uncond, "image": jnp.zeros_like(image[:1])}
  )

  def network(params, x_t, t, cond):
    return Network()(params, x_t, t, cond) * (1.0 + cond["image"])

  ours = guidance.text_and_image(network, 7.0, 1.5)(PARAMS, x_t, t, cond)
  neither, both = branches(x_t, t, cond)
  with_image = neither * (1.0 + image)
  both = both * (1.0 + image)
  expected = neither + 1.5 * (with_image - neither) + 7.0 * (both - with_image)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
  # An image scale of 0 and a network that does not look at the image leave plain guidance.
  plain = guidance.classifier_free(Network(), 7.0)(PARAMS, x_t, t, cond)
  blind = guidance.text_and_image(Network(), 7.0, 0.0)(PARAMS, x_t, t, cond)
  np.testing.assert_allclose(blind, plain, rtol=1e-5, atol=1e-5)


def test_the_section_of_a_config_without_a_name_is_classifier_free_guidance():
  x_t, t, cond = make_inputs()
  wanted = guidance.classifier_free(Network(), 2.5)(PARAMS, x_t, t, cond)
  for section in ({"scale": 2.5}, {"name": "classifier_free", "scale": 2.5}):
    found = guidance.make(Network(), **section)(PARAMS, x_t, t, cond)
    np.testing.assert_array_equal(found, wanted)


def fading(denoise_fn, *, scale):
  """Guidance from outside the package, that is weaker the nearer to the data."""

  def guided(params, x_t, t, cond):
    strength = (1.0 + scale * t / 1000.0)[:, None, None, None]
    uncond = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), cond.uncond, cond.cond)
    away, towards = denoise_fn(params, x_t, t, uncond), denoise_fn(params, x_t, t, cond.cond)
    return away + strength * (towards - away)

  return guided


def not_a_guidance(denoise_fn):
  return None


def test_a_guidance_from_outside_is_named_by_its_function():
  x_t, t, cond = make_inputs()
  made = guidance.make(Network(), name=f"{__name__}:fading", scale=2.0)
  without, with_text = branches(x_t, t, cond)
  strength = (1.0 + 2.0 * t / 1000.0)[:, None, None, None]
  np.testing.assert_allclose(
    made(PARAMS, x_t, t, cond), without + strength * (with_text - without), rtol=1e-6
  )


@pytest.mark.parametrize("section, message", [
  ({"scal": 2.5}, r"config\.guidance 'classifier_free': missing .*did you mean \"scale\""),
  ({"name": f"{__name__}:fading", "scales": 1.0}, r"fading': missing .* valid keys: scale"),
  ({"name": f"{__name__}:fadin"}, r'config\.guidance\.name ".*" has no "fadin"; did you mean'),
  ({"name": "clasifier_free"}, r"unknown guidance .*; did you mean \"classifier_free\"\?\nValid"),
  ({"name": f"{__name__}:not_a_guidance"}, r"to return a function .*, got NoneType"),
])  # fmt: skip
def test_what_is_wrong_with_a_guidance(section, message):
  with pytest.raises(ValueError, match=message) as error:
    guidance.make(Network(), **section)
  assert len(str(error.value).splitlines()) <= 3


def test_how_often_the_network_is_asked():
  count = guidance.count_branches
  assert (count(scale=1.0), count(scale=2.5), count(name="mine:own", scale=1.0)) == (1, 2, None)
