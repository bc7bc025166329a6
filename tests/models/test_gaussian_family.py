"""The Gaussian family: its chain reproduces what it is the denoiser of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.diffusion import rollout
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.models.adapters import policy
from jaxalign.models.families import gaussian
from jaxalign.worlds import gaussian as world

RECORDS = [{}, {"id": 3}]
MEAN, STD = np.array([0.5, -0.3]), np.array([1.0, 0.7])


def variables(model):
  return {"params": model.params["denoiser"]}


def sample(model, num_samples, **section):
  process = model.make_process(**section)
  key_start, key_steps = jax.random.split(jax.random.key(0))
  x_T = jax.random.normal(key_start, (num_samples, *model.latent_shape))
  cond = model.condition({}, model.tokenize([{}] * num_samples))
  kernel = Kernel(model.denoise, process.transition)
  args = (kernel, variables(model), process.table, x_T, cond, mean_over_latents)
  return np.asarray(rollout.rollout(key_steps, *args).x_0), np.asarray(x_T)


@pytest.mark.parametrize("schedule", gaussian.PREDICTION)
def test_the_contract(schedule):
  model = gaussian.open_model("gaussian", schedule=schedule)
  assert model.latent_shape == model.sample_shape == (2,) and model.empty is None
  tokens = model.tokenize(RECORDS)
  assert [leaf.shape for leaf in jax.tree.leaves(tokens)] == [(2, 1)] and not tokens.any()
  x = np.ones((2, 2), np.float32)
  np.testing.assert_array_equal(model.encode({}, x, jax.random.key(0)), x)
  np.testing.assert_array_equal(model.decode({}, x), x)
  assert model.describe({"id": 3}) == "id 3" and model.describe({}) == ""
  assert model.files.adapted == {}
  sigma = model.levels.sigma_t
  assert sigma.shape == (1000,) and (np.diff(sigma) > 0).all()
  shapes = gaussian.open_model("gaussian", schedule=schedule, shapes_only=True).params
  assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, model.params)


@pytest.mark.parametrize("schedule", gaussian.PREDICTION)
def test_the_denoiser_is_that_of_a_mixture_of_one(schedule):
  model = gaussian.open_model("gaussian", schedule=schedule)
  rows = np.array([0, 10, 500, 900, 999])
  step = model.levels[rows]
  x_t = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  mixture = world.Mixture(jnp.zeros(1), jnp.array(MEAN)[None], jnp.diag(jnp.array(STD) ** 2)[None])
  x_0 = world.posterior_mean(mixture, x_t, step.alpha_t, step.sigma_t)
  expected = x_0
  if schedule == "flow":
    expected = (x_t - step.alpha_t[:, None] * x_0) / step.sigma_t[:, None] - x_0
  found = model.denoise(variables(model), x_t, step.t, None)
  # eps of the expected value is a difference divided by a sigma of 0.001
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 if schedule == "flow" else 1e-5)


@pytest.mark.parametrize("schedule", gaussian.PREDICTION)
def test_the_time_of_a_level_gives_the_level_back(schedule):
  for table in (gaussian.make_table(schedule, 7), gaussian.make_table(schedule, 1000)):
    alpha, sigma = gaussian.levels_at(schedule, table.t)
    np.testing.assert_allclose(alpha, table.alpha_t, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sigma, table.sigma_t, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(table.alpha_t[1:], table.alpha_s[:-1])
    assert table.alpha_s[-1] == 1.0 and table.sigma_s[-1] == 0.0


def test_many_euler_steps_carry_noise_to_the_gaussian_itself():
  """The ODE between Gaussians is affine: x_0 = mean + std x_T, sample by sample."""
  model = gaussian.open_model("gaussian", schedule="flow", mean=(2.0, -1.0, 0.0), std=(0.5, 1, 2))
  x_0, x_T = sample(model, 500, num_steps=1000, transition="euler")
  np.testing.assert_allclose(x_0, [2.0, -1.0, 0.0] + np.array([0.5, 1.0, 2.0]) * x_T, atol=0.02)


@pytest.mark.parametrize("schedule, section", [
  ("log_snr", dict(transition="ddpm")),
  ("log_snr", dict(transition="ddim", eta=0.5)),
  ("log_snr", dict(transition="cps", noise_level=0.1)),
  ("flow", dict(transition="flow_sde", noise_level=0.5)),
  ("flow", dict(transition="dance_sde", eta=0.3)),
  ("flow", dict(transition="cps", noise_level=0.2)),
])  # fmt: skip
def test_every_transition_samples_the_gaussian(schedule, section):
  model = gaussian.open_model("gaussian", schedule=schedule)
  x_0, _ = sample(model, 20_000, num_steps=200, **section)
  np.testing.assert_allclose(x_0.mean(axis=0), MEAN, atol=0.04)
  np.testing.assert_allclose(x_0.std(axis=0), STD, rtol=0.06)


@pytest.mark.parametrize("section, message", [
  (dict(transition="euler"), r"'euler': expected the schedule of a rectified flow"),
  (dict(transition="ddim"), "expected eta; got none"),
  (dict(transition="ddmi", eta=1.0), "expected one of ddim"),
])  # fmt: skip
def test_a_section_that_does_not_fit_is_explained(section, message):
  with pytest.raises(ValueError, match=message):
    gaussian.open_model("gaussian").make_process(num_steps=4, **section)


@pytest.mark.parametrize("options, message", [
  (dict(schedule="log_snt"), 'schedule: expected one of log_snr, flow.*did you mean "log_snr"'),
  (dict(mean=(0.0,)), "one number of each for every dimension"),
  (dict(std=(1.0, 0.0)), "std positive"),
])  # fmt: skip
def test_options_that_do_not_fit_are_explained(options, message):
  with pytest.raises(ValueError, match=message):
    gaussian.open_model("gaussian", **options)


def test_a_saved_model_opens_to_the_same_bits(tmp_path):
  model = gaussian.open_model("gaussian", schedule="flow", mean=(0.1,), std=(0.3,))
  model.files.save(model.params, tmp_path)
  again = gaussian.open_model(tmp_path)
  assert again.latent_shape == (1,) and again.prediction_type == "velocity"
  for name, leaf in model.params["denoiser"].items():
    np.testing.assert_array_equal(np.asarray(again.params["denoiser"][name]), leaf)
  with pytest.raises(ValueError, match="expected no schedule, which a folder has of its own"):
    gaussian.open_model(tmp_path, schedule="flow")
  with pytest.raises(ValueError, match="expected params of the denoiser, found none"):
    model.files.save({}, tmp_path)


def test_a_policy_of_all_parameters_is_the_reference_at_first():
  model = gaussian.open_model("gaussian")
  params = model.params["denoiser"]
  made = policy.make_policy(params, jax.random.key(0), rank=0, alpha=1.0, targets="")
  assert set(made.params["params"]) == {"mean", "log_std"} and not jax.tree.leaves(made.base)
  x_t, t = np.ones((2, 2), np.float32), np.array([3.0, 900.0], np.float32)
  whole = made.variables(made.params, made.base)
  expected = model.denoise(variables(model), x_t, t, None)
  np.testing.assert_array_equal(model.denoise(whole, x_t, t, None), expected)
