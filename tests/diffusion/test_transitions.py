"""Reverse steps against closed forms, and how they are made from a config."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_configs import SD1
from transition_cases import FLOW, KNOBS, apply, draw

from jaxalign.diffusion import gaussian, schedules, transitions
from jaxalign.diffusion.schedules import StepTable


def flow_step(sigma_t, sigma_s):
  values = (1000 * sigma_t, 1 - sigma_t, sigma_t, 1 - sigma_s, sigma_s, 1.0)
  return StepTable(*(jnp.float32(v) for v in values))


# mean = c_x x_t + c_e eps, std, and the KL per squared change of eps, in double precision.
SD1_ETA_1 = {
  981: (1.12285170, -0.23293578, 0.45446327, 0.13135446),
  501: (1.04845633, -0.11118792, 0.29478454, 0.07113377),
  21: (1.00909553, -0.12928714, 0.03947955, 5.36211753),
  1: (1.00042762, -0.02071417, 0.02064832, 0.50319399),
}


@pytest.mark.parametrize("t", SD1_ETA_1)
def test_sd1_coefficients_and_kl(t):
  process = transitions.make_process(SD1, num_steps=50, transition="ddim", eta=1.0)
  step = process.table[int(np.flatnonzero(process.table.t == t)[0])]
  one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
  c_x, std = process.transition(one, zero, step)
  c_e, _ = process.transition(zero, one, step)
  kl = gaussian.kl(c_e, zero, std)
  ours = [c_x.item(), c_e.item(), std.item(), kl.item()]
  # The known values start from alpha_0^2 = 0.99915; rounded to float32, as diffusers has it, the
  # last step's variance moves by 4e-5.
  np.testing.assert_allclose(ours, SD1_ETA_1[t], rtol=6e-5 if t == 1 else 2e-5)


def test_flow_coefficients_by_hand():
  # s = .5 -> .4 with a = .7: g = .7 sqrt(.5 / .5) = .7; 1 + g^2 dt / 2s = 1 - .049 = .951;
  # (1 + g^2 (1 - s) / 2s) dt = -.1245; std = .7 sqrt(.1) = .22135944.
  step, one, zero = flow_step(0.5, 0.4), jnp.ones((1, 1)), jnp.zeros((1, 1))
  sde = functools.partial(transitions.flow_sde, prediction_type="velocity", noise_level=0.7)
  c_x, std = sde(one, zero, step)
  c_v, _ = sde(zero, one, step)
  np.testing.assert_allclose(
    [c_x.item(), c_v.item(), std.item()], [0.951, -0.1245, 0.22135944], 1e-6
  )
  dance = transitions.dance_sde(one, zero, step, prediction_type="velocity", eta=0.7)
  np.testing.assert_allclose([dance[0].item(), dance[1].item()], [0.951, 0.22135944], 1e-6)
  # CPS with a = .8: std = .4 sin(.4 pi), noise coefficient .4 cos(.4 pi). With velocity 1 at
  # x = .5, x_0 = 0 and eps = 1, so the mean is that coefficient.
  mean, std = transitions.cps(0.5 * one, one, step, prediction_type="velocity", noise_level=0.8)
  np.testing.assert_allclose([mean.item(), std.item()], [0.1236068, 0.38042261], rtol=1e-5)


def test_flow_kl_in_velocity_space():
  # KL = |dt| / 2 (g (1 - s) / (2 s) + 1 / g)^2 (v_1 - v_2)^2, with s = .8 -> .65, g = .3.
  x_t, v_1, v_2 = (jnp.array(a) for a in draw())
  step = flow_step(0.8, 0.65)
  sde = functools.partial(transitions.dance_sde, prediction_type="velocity", eta=0.3)
  (mean_1, std), (mean_2, _) = sde(x_t, v_1, step), sde(x_t, v_2, step)
  expected = 0.15 / 2 * (0.3 * 0.2 / 1.6 + 1 / 0.3) ** 2 * (v_1 - v_2) ** 2
  np.testing.assert_allclose(gaussian.kl(mean_1, mean_2, std), expected, rtol=1e-3, atol=1e-6)


def test_ddim_at_eta_1_is_the_ddpm_posterior():
  # Bayes: x_s | x_0 ~ N(alpha_s x_0, sigma_s^2), x_t | x_s ~ N(r x_s, sigma_t^2 - r^2 sigma_s^2).
  x_t, x_0, _ = draw()
  config = dict(SD1, prediction_type="sample")
  process = transitions.make_process(config, num_steps=20, transition="ddim", eta=1.0)
  ancestral = transitions.make_process(config, num_steps=20, transition="ddpm")
  for i in (0, 7, 19):
    step = process.table[i]
    fields = (step.alpha_t, step.sigma_t, step.alpha_s, step.sigma_s)
    alpha_t, sigma_t, alpha_s, sigma_s = (np.float64(f) for f in fields)
    r = alpha_t / alpha_s
    noise = sigma_t**2 - r**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + r**2 / noise)
    expected = variance * (alpha_s * x_0 / sigma_s**2 + r * x_t / noise)
    for name, p in [("ddim", process), ("ddpm", ancestral)]:
      mean, std = apply(name, p, x_t, x_0, step)
      np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(std.item() ** 2, variance, rtol=1e-5)


@pytest.mark.parametrize("transition", [name for name in KNOBS if name != "cps"])
def test_marginals_are_kept(transition):
  # Data N(m, v) in one dimension has an exact denoiser, under which every quantity is Gaussian
  # and the chain's variance can be followed without sampling: x_s = c x_t + d + std z. With many
  # steps each transition must end at the data, whatever its noise. CPS is not such a
  # transition: it keeps the noise coefficient of a step, not the marginal.
  m, v = 1.5, 0.25
  config = dict(_class_name=FLOW)
  process = transitions.make_process(
    config, num_steps=400, transition=transition, **KNOBS[transition]
  )

  def moments(carry, step):
    mean, variance = carry

    def predict(x):
      total = step.alpha_t**2 * v + step.sigma_t**2
      x_0 = m + step.alpha_t * v / total * (x - step.alpha_t * m)
      return (x - x_0) / step.sigma_t  # velocity = (x_t - x_0) / sigma_t for alpha = 1 - sigma

    step_mean = lambda x: process.transition(x, predict(x), step)[0]  # noqa: E731
    at_mean, slope = jax.jvp(step_mean, (mean,), (jnp.ones_like(mean),))
    std = process.transition(mean, predict(mean), step)[1]
    return (at_mean, slope**2 * variance + std**2), None

  start = jnp.zeros((1, 1)), jnp.ones((1, 1))
  (mean, variance), _ = jax.lax.scan(moments, start, jax.tree.map(jnp.asarray, process.table))
  np.testing.assert_allclose(mean.item(), m, rtol=0.02)
  np.testing.assert_allclose(variance.item(), v, rtol=0.05)


@pytest.mark.parametrize("transition", ["ddim", "flow_sde", "dance_sde", "cps"])
def test_noise_scale_zero_is_the_ode(transition):
  x_t, velocity, _ = draw()
  config = dict(_class_name=FLOW, shift=3.0)
  process = transitions.make_process(
    config, num_steps=8, transition=transition, **KNOBS[transition]
  )
  euler = transitions.make_process(config, num_steps=8, transition="euler")
  scales = np.array([1, 0, 0, 1, 1, 1, 1, 0], np.float32)
  table = StepTable(**{**vars(process.table), "noise_scale": scales})
  for i in range(8):
    mean, std = apply(transition, process, x_t, velocity, table[i])
    full = apply(transition, process, x_t, velocity, process.table[i])
    if scales[i]:
      np.testing.assert_array_equal(mean, full[0])
      np.testing.assert_array_equal(std, full[1])
    else:
      ode, _ = apply("euler", euler, x_t, velocity, table[i])
      np.testing.assert_allclose(mean, ode, atol=2e-6)
      assert not np.any(std)


@pytest.mark.parametrize("transition", KNOBS)
def test_per_example_steps_equal_scalar_steps(transition):
  x_t, velocity, _ = draw((3, 5, 3, 2))
  process = transitions.make_process(
    dict(_class_name=FLOW), num_steps=6, transition=transition, **KNOBS[transition]
  )
  i = np.array([0, 5, 2])
  mean, std = process.transition(x_t, velocity, process.table[i])
  assert mean.shape == x_t.shape and std.shape == (3, 1, 1, 1)
  for b in range(3):
    one = slice(b, b + 1)
    alone = process.transition(x_t[one], velocity[one], process.table[int(i[b])])
    np.testing.assert_allclose(mean[one], alone[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(std[b].item(), alone[1], rtol=1e-6)


def test_last_steps():
  x_t, velocity, _ = draw()
  config = dict(_class_name=FLOW)
  stds = {}
  for name in ("flow_sde", "cps", "ddim"):
    process = transitions.make_process(config, num_steps=6, transition=name, **KNOBS[name])
    stds[name] = float(np.max(process.transition(x_t, velocity, process.table[5])[1]))
  assert stds["flow_sde"] > 0 and stds["cps"] == 0 and stds["ddim"] == 0
  process = transitions.make_process(SD1, num_steps=50, transition="ddim", eta=1.0)
  assert float(process.transition(x_t, velocity, process.table[49])[1]) > 0.02


@pytest.mark.parametrize(
  "config,arguments,message",
  [
    (SD1, dict(transition="dimm", eta=1.0), "ddim, ddpm, euler, flow_sde, dance_sde, cps.*'dimm'"),
    (SD1, dict(transition="ddim"), "expected eta; got none"),
    (SD1, dict(transition="ddim", noise_level=0.7), "expected eta; got noise_level"),
    (SD1, dict(transition="ddpm", eta=1.0), "expected no noise argument; got eta"),
    (SD1, dict(transition="ddim", eta=1.1), "0 to 1.0; got 1.1"),
    (SD1, dict(transition="flow_sde", noise_level=0.7), "got DDIMScheduler"),
    (dict(SD1, prediction_type="flow"), dict(transition="ddim", eta=1.0), "'flow'"),
    (
      dict(SD1, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
      dict(transition="ddim", eta=1.0),
      "zero SNR",
    ),
  ],
)
def test_make_process_explains_what_is_wrong(config, arguments, message):
  with pytest.raises(ValueError, match=message):
    transitions.make_process(config, num_steps=10, **arguments)


def test_make_process_reads_the_prediction_type_and_the_clipping():
  for config, expected in [
    (dict(SD1), dict(prediction_type="eps")),
    (dict(SD1, prediction_type="v_prediction"), dict(prediction_type="v")),
    (dict(_class_name="DDIMScheduler"), dict(prediction_type="eps", clip_x_0=1.0)),
    (dict(_class_name=FLOW), dict(prediction_type="velocity")),
  ]:
    process = transitions.make_process(config, num_steps=4, transition="ddim", eta=1.0)
    assert process.transition.keywords == dict(expected, eta=1.0)
  assert isinstance(process.table, schedules.StepTable)
