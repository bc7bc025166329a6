"""Reverse steps against diffusers, the recorded reference implementations, and closed forms."""

import functools
import itertools
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scheduler_configs import SD1

from jaxalign.diffusion import gaussian, schedules, transitions
from jaxalign.diffusion.schedules import StepTable
from jaxalign.types import expand_to

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = {c["case"]: c for c in json.loads((GOLDEN / "transitions_and_losses.json").read_text())}
ARRAYS = np.load(GOLDEN / "transitions_and_losses.npz")
FLOW = "FlowMatchEulerDiscreteScheduler"
BETAS = [("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 0, 0)]
GRIDS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
# Compiled once for all cases: only the step's numbers differ.
JITTED = {
  name: jax.jit(kind.transition, static_argnames="prediction_type")
  for name, kind in transitions.TRANSITIONS.items()
}


def apply(name, process, x_t, prediction, step):
  return JITTED[name](x_t, prediction, step, **process.transition.keywords)


def draw(shape=(2, 5, 3, 2), seed=0):
  return np.random.default_rng(seed).normal(size=(3, *shape)).astype(np.float32)


def flow_step(sigma_t, sigma_s):
  values = (1000 * sigma_t, 1 - sigma_t, sigma_t, 1 - sigma_s, sigma_s, 1.0)
  return StepTable(*(jnp.float32(v) for v in values))


def in_double(scheduler):
  """Lets diffusers do its arithmetic in float64, so that it is the more exact of the two.

  Rescaled to zero SNR, its own alphas differ between CPUs by a rounding that small alphas magnify a
  hundred times. There it gets ours, which test_schedules compares with its own.
  """
  if scheduler.config.rescale_betas_zero_snr:
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    fields = {name: scheduler.config[name] for name in names}
    alphas_cumprod = schedules.ddpm_alphas_cumprod(**fields, rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod = torch.from_numpy(alphas_cumprod)
    if not scheduler.config.get("set_alpha_to_one", True):
      scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
  scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
  if hasattr(scheduler, "final_alpha_cumprod"):
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
  return scheduler


def options():
  grid = itertools.product(
    GRIDS, BETAS, ["epsilon", "sample", "v_prediction"], [False, True], [False, True]
  )
  for (spacing, offset), (name, start, end), prediction_type, zero_snr, clip in grid:
    if prediction_type == "epsilon" and zero_snr:
      continue  # x_0 is undetermined at zero SNR: diffusers gives nan, make_process an error
    yield dict(
      timestep_spacing=spacing,
      steps_offset=offset,
      beta_schedule=name,
      beta_start=start,
      beta_end=end,
      prediction_type=prediction_type,
      rescale_betas_zero_snr=zero_snr,
      clip_sample=clip,
      clip_sample_range=1.5,
    )


def label(config):
  return "-".join(str(v) for v in config.values())


@pytest.mark.parametrize("config", options(), ids=label)
def test_ddim_equals_diffusers(config):
  x_t, prediction, noise = draw()
  for alpha_to_one, eta in [(False, 1.0), (True, 0.3)]:
    fields = dict(config, set_alpha_to_one=alpha_to_one)
    scheduler = in_double(diffusers.DDIMScheduler(**fields))
    scheduler.set_timesteps(7)
    process = transitions.make_process(
      dict(fields, _class_name="DDIMScheduler"), num_steps=7, transition="ddim", eta=eta
    )
    for i, t in enumerate(scheduler.timesteps):
      mean, std = apply("ddim", process, x_t, prediction, process.table[i])
      variance = torch.tensor(noise).double()
      arrays = torch.tensor(prediction).double(), int(t), torch.tensor(x_t).double()
      noisy = scheduler.step(*arrays, eta=eta, variance_noise=variance)
      theirs = noisy.prev_sample
      if not torch.isfinite(theirs).all():
        # At zero SNR with eta = 1 their 1 - alpha_s^2 - std^2 is 0 and rounds below it; the noise
        # replaces all of x_t.
        assert eta == 1.0 and scheduler.alphas_cumprod[t] == 0
        step = process.table[i]
        theirs = step.alpha_s * noisy.pred_original_sample + step.sigma_s * variance
      np.testing.assert_allclose(mean + std * noise, theirs, rtol=1e-5, atol=1e-5)
      previous = int(t) - 1000 // 7
      theirs_std = eta * float(scheduler._get_variance(int(t), previous)) ** 0.5
      np.testing.assert_allclose(std.item(), theirs_std, rtol=1e-5)


@pytest.mark.parametrize("config", options(), ids=label)
def test_ddpm_equals_diffusers(config, monkeypatch):
  # Without noise the step returns its mean; the variance is asked for separately.
  monkeypatch.setattr(
    diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda s, **_: torch.zeros(s)
  )
  x_t, prediction, _ = draw()
  scheduler = in_double(diffusers.DDPMScheduler(**config))
  scheduler.set_timesteps(7)
  process = transitions.make_process(
    dict(config, _class_name="DDPMScheduler"), num_steps=7, transition="ddpm"
  )
  for i, t in enumerate(scheduler.timesteps):
    mean, std = apply("ddpm", process, x_t, prediction, process.table[i])
    arrays = torch.tensor(prediction).double(), t, torch.tensor(x_t).double()
    theirs = scheduler.step(*arrays).prev_sample
    np.testing.assert_allclose(mean, theirs, rtol=1e-5, atol=1e-5)
    variance = float(scheduler._get_variance(t))  # diffusers puts 1e-20 in place of 0
    np.testing.assert_allclose(std.item() ** 2, variance, rtol=2e-5, atol=2e-20)


@pytest.mark.parametrize("config", [dict(), dict(shift=3.0), dict(use_dynamic_shifting=True)])
def test_euler_equals_diffusers(config):
  x_t, prediction, _ = draw()
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
  scheduler.set_timesteps(9, mu=1.15 if config.get("use_dynamic_shifting") else None)
  process = transitions.make_process(
    dict(config, _class_name=FLOW), num_steps=9, transition="euler", image_seq_len=4096
  )
  for i, t in enumerate(scheduler.timesteps):
    mean, std = apply("euler", process, x_t, prediction, process.table[i])
    theirs = scheduler.step(torch.tensor(prediction), t, torch.tensor(x_t)).prev_sample.numpy()
    np.testing.assert_allclose(mean, theirs, rtol=1e-6, atol=1e-6)
    assert not np.any(std)


def rows_at(table, timesteps):
  return table[np.array([int(np.flatnonzero(table.t == t)[0]) for t in timesteps])]


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("ddim")])
def test_ddim_log_prob_equals_ddpo_pytorch(name):
  case, array = CASES[name], {k.split("/")[1]: ARRAYS[k] for k in ARRAYS if k.startswith(name)}
  config = dict(SD1, prediction_type=case["prediction_type"])
  assert all(config[k] == case[k] for k in config if k in case)
  process = transitions.make_process(
    config, num_steps=case["num_inference_steps"], transition="ddim", eta=case["eta"]
  )
  step = rows_at(process.table, array["timesteps"])
  mean, std = apply("ddim", process, array["x_t"], array["model_output"], step)
  for x_s, expected in [("x_prev", "log_prob"), ("sampled_x_prev", "sampled_log_prob")]:
    log_prob = gaussian.log_prob(array[x_s], mean, std).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(log_prob, array[expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("flow")])
def test_flow_sde_equals_flow_grpo(name):
  case, array = CASES[name], {k.split("/")[1]: ARRAYS[k] for k in ARRAYS if k.startswith(name)}
  process = transitions.make_process(
    dict(_class_name=FLOW, shift=case["shift"]),
    num_steps=case["num_inference_steps"],
    transition="flow_sde",
    noise_level=case["noise_level"],
  )
  np.testing.assert_allclose(process.table.sigma_t, array["sigmas"][:-1], rtol=1e-6)
  step = process.table[array["step_index"]]
  np.testing.assert_allclose(step.t, array["timesteps"], rtol=1e-6)
  mean, std = apply("flow_sde", process, array["x_t"], array["model_output"], step)
  np.testing.assert_allclose(mean, array["mean"], rtol=1e-5, atol=1e-6)
  # The recorded std_dev_t is g; the standard deviation is g sqrt(-dt).
  g = std.squeeze() / np.sqrt(step.sigma_t - step.sigma_s)
  np.testing.assert_allclose(g, array["std_dev_t"].squeeze(), rtol=1e-5)
  log_prob = gaussian.log_prob(array["x_prev"], mean, std).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(log_prob, array["log_prob"], rtol=1e-5, atol=1e-6)


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


KNOBS = {
  "ddim": dict(eta=0.6),
  "ddpm": {},
  "euler": {},
  "flow_sde": dict(noise_level=0.7),
  "dance_sde": dict(eta=0.3),
  "cps": dict(noise_level=0.8),
}


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


@pytest.mark.parametrize("name", transitions.TRANSITIONS)
def test_a_table_of_ones_own_is_bound_as_that_of_a_config(name):
  config = dict(_class_name=FLOW)
  expected = transitions.make_process(config, num_steps=6, transition=name, **KNOBS[name])
  bound = transitions.bind(expected.table, name, "velocity", **KNOBS[name])
  x_t, velocity, _ = draw()
  for found, wanted in zip(
    bound.transition(x_t, velocity, bound.table[2]),
    expected.transition(x_t, velocity, expected.table[2]),
    strict=True,
  ):
    np.testing.assert_array_equal(found, wanted)


def test_bind_explains_what_is_wrong():
  flow, other = schedules.uniform_flow_table(4), schedules.log_snr_table(4)
  with pytest.raises(ValueError, match=r"'dance_sde': expected the schedule of a rectified flow"):
    transitions.bind(other, "dance_sde", "x_0", eta=0.3)
  with pytest.raises(ValueError, match="expected noise_level; got none"):
    transitions.bind(flow, "cps", "velocity")
  with pytest.raises(ValueError, match="zero SNR"):
    transitions.bind(flow, "ddim", "eps", eta=0.0)


def half_noise(x_t, prediction, row, *, prediction_type, share, fault=""):
  """CPS from outside the package, and with a `fault` one of the mistakes that are looked for."""
  mean, std = transitions.cps(
    x_t, prediction, row, prediction_type=prediction_type, noise_level=share
  )
  if fault == "not a pair":
    return mean
  if fault == "not expanded":
    return mean, row.sigma_s * np.sin(share * row.noise_scale * np.pi / 2)
  if fault == "a number for all":
    return mean, 0.0
  if fault == "negative":
    return mean, -std
  if fault == "not a number":
    return mean, std * np.nan
  if fault == "learned":
    return mean, std * jnp.exp(prediction)
  if fault == "deaf":
    return mean, share * expand_to(row.sigma_s, x_t)
  return mean, std


OWN = f"{__name__}:half_noise"


@pytest.mark.parametrize("scheduler", [dict(_class_name=FLOW), SD1])
def test_a_transition_from_outside_is_named_by_its_function(scheduler):
  """With the prediction type of the model, and the knobs of the config."""
  own = transitions.make_process(scheduler, num_steps=6, transition=OWN, share=0.8)
  cps = transitions.make_process(scheduler, num_steps=6, transition="cps", noise_level=0.8)
  x_t, prediction, _ = draw((6, 5, 3, 2))
  for found, wanted in zip(
    own.transition(x_t, prediction, own.table),
    cps.transition(x_t, prediction, cps.table),
    strict=True,
  ):
    np.testing.assert_array_equal(found, wanted)
  assert own.noisy_steps() == cps.noisy_steps()
  assert transitions.bind(cps.table[:1], OWN, "velocity", share=0.8).noisy_steps() == [0]


@pytest.mark.parametrize(
  "name, knobs, message",
  [
    (OWN, dict(share=0.5, fault="not a pair"), r"to return \(mean, std\), got ArrayImpl"),
    (OWN, dict(share=0.5, fault="not expanded"), r"std \(4, 1\) of x_t .* \(4,\)\n.*expand_to"),
    (OWN, dict(share=0.5, fault="a number for all"), r"got \(4, 1\) and \(\)"),
    (OWN, dict(share=0.5, fault="negative"), r"finite std of at least 0, got \[-"),
    (OWN, dict(share=0.5, fault="not a number"), r"finite std of at least 0, got \[nan"),
    (OWN, dict(share=0.5, fault="learned"), "a std that depends on the row alone"),
    (OWN, dict(share=0.5, fault="deaf"), r"std 0 where row\.noise_scale is 0, got more\nmultiply"),
    (OWN, dict(shar=0.5), r"half_noise': missing a required .*'share'.*did you mean \"share\""),
    (f"{__name__}:half_nois", {}, r'transition ".*": module .* did you mean "half_noise"'),
    ("nowhere.to_be:found", {}, "could not import"),
    ("flow_sd", {}, r'or your own function as .*; got \'flow_sd\'; did you mean "flow_sde"'),
  ],
)
def test_what_is_wrong_with_a_transition_from_outside(name, knobs, message):
  with pytest.raises(ValueError, match=message) as error:
    transitions.bind(schedules.uniform_flow_table(4), name, "velocity", **knobs)
  assert len(str(error.value).splitlines()) <= 3
