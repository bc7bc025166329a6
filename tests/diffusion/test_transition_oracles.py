"""Reverse steps against diffusers and the recorded reference implementations."""

import itertools
import json
import pathlib

import diffusers
import numpy as np
import pytest
import torch
from scheduler_configs import SD1
from transition_cases import FLOW, apply, draw

from jaxalign.diffusion import gaussian, schedules, transitions

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = {c["case"]: c for c in json.loads((GOLDEN / "transitions_and_losses.json").read_text())}
ARRAYS = np.load(GOLDEN / "transitions_and_losses.npz")
BETAS = [("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 0, 0)]
GRIDS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]


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
