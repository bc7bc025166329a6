"""Step tables against diffusers' schedulers, over their option grids, and against known values."""

import itertools
import json
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scheduler_configs import SD1_SCHEDULE

from jaxalign.diffusion import schedulers, schedules

BETAS = [("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 0, 0)]
GRIDS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]


# Rescaling to zero SNR subtracts float32 square roots, which PyTorch rounds differently on other
# CPUs: the oracle itself is known to two units in the last place of 1 only.
ZERO_SNR_ATOL = 2.4e-7


def previous_square(scheduler, t):
  """alpha_s^2 by DDIMScheduler's rule, written from its documentation of final_alpha_cumprod."""
  s = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
  return float(scheduler.alphas_cumprod[s] if s >= 0 else scheduler.final_alpha_cumprod)


@pytest.mark.parametrize("betas,zero_snr", itertools.product(BETAS, [False, True]))
def test_alphas_cumprod_equals_diffusers(betas, zero_snr):
  name, start, end = betas
  fields = dict(num_train_timesteps=1000, beta_start=start, beta_end=end, beta_schedule=name)
  fields["rescale_betas_zero_snr"] = zero_snr
  ours = schedules.ddpm_alphas_cumprod(**fields)
  theirs = diffusers.DDIMScheduler(**fields).alphas_cumprod.numpy()
  atol = ZERO_SNR_ATOL if zero_snr else 0.0
  # 1 - alpha^2 is the variance: it must agree near the data too, where one float32 ulp matters.
  np.testing.assert_allclose(1 - ours, 1 - theirs, rtol=1e-5, atol=atol)
  np.testing.assert_allclose(ours**0.5, theirs**0.5, rtol=1e-5, atol=atol)
  assert (ours[-1] == 0) == zero_snr


def test_sd1_alphas_cumprod():
  names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
  fields = {name: SD1_SCHEDULE[name] for name in names}
  ours = schedules.ddpm_alphas_cumprod(**fields)[[0, 1, 21, 500, 961, 981, 999]]
  known = [0.99915, 0.99829603, 0.98038075, 0.27633268, 0.00728173, 0.0057755, 0.0046601]
  np.testing.assert_allclose(ours, known, rtol=1e-5, atol=5e-9)


def test_squared_cosine_is_capped():
  fields = dict(num_train_timesteps=10, beta_start=0.0, beta_end=0.0)
  abar = schedules.ddpm_alphas_cumprod(beta_schedule="squaredcos_cap_v2", **fields)
  assert abar[-1] / abar[-2] == pytest.approx(1 - 0.999, rel=1e-4)


@pytest.mark.parametrize(
  "grid,betas,num_steps,zero_snr,alpha_to_one",
  itertools.product(GRIDS, BETAS, [1, 7, 50], [False, True], [False, True]),
)
def test_ddim_table_equals_diffusers(grid, betas, num_steps, zero_snr, alpha_to_one):
  config = dict(
    num_train_timesteps=1000,
    beta_start=betas[1],
    beta_end=betas[2],
    beta_schedule=betas[0],
    timestep_spacing=grid[0],
    steps_offset=grid[1],
    set_alpha_to_one=alpha_to_one,
    rescale_betas_zero_snr=zero_snr,
  )
  scheduler = diffusers.DDIMScheduler(**config)
  scheduler.set_timesteps(num_steps)
  table = schedules.ddim_table(num_steps, **config)
  t = scheduler.timesteps.numpy()
  np.testing.assert_array_equal(table.t, t)
  square_s = np.array([previous_square(scheduler, int(i)) for i in t])
  square_t = scheduler.alphas_cumprod.numpy()[t]
  atol = ZERO_SNR_ATOL if zero_snr else 0.0
  np.testing.assert_allclose(table.alpha_t**2, square_t, rtol=1e-5, atol=atol)
  np.testing.assert_allclose(table.alpha_s**2, square_s, rtol=1e-5, atol=atol)
  np.testing.assert_allclose(table.sigma_s**2, 1 - square_s, rtol=1e-5, atol=atol)
  np.testing.assert_allclose(table.alpha_t**2 + table.sigma_t**2, 1, rtol=1e-6)


@pytest.mark.parametrize("grid,num_steps", itertools.product(GRIDS, [1, 7, 50]))
def test_ddpm_table_equals_diffusers(grid, num_steps):
  config = dict(timestep_spacing=grid[0], steps_offset=grid[1])
  betas = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
  scheduler = diffusers.DDPMScheduler(**config, **betas)
  scheduler.set_timesteps(num_steps)
  table = schedules.ddpm_table(num_steps, **config, **betas)
  t = scheduler.timesteps.numpy()
  np.testing.assert_array_equal(table.t, t)
  s = np.array([int(scheduler.previous_timestep(i)) for i in t])
  square_s = np.where(s >= 0, scheduler.alphas_cumprod.numpy()[s], 1.0)
  np.testing.assert_allclose(table.alpha_s**2, square_s, rtol=1e-6)
  assert s[-1] == -1 and table.sigma_s[-1] == 0


def test_sd1_grid_keeps_a_variance_on_the_last_step():
  table = schedules.ddim_table(50, **SD1_SCHEDULE)
  np.testing.assert_array_equal(table.t, np.arange(981, 0, -20))
  assert table.alpha_s[-1] ** 2 == pytest.approx(0.99915, abs=1e-7)
  assert table.sigma_s[-1] ** 2 == pytest.approx(0.00085, rel=1e-4)


FLOW_CONFIGS = [
  dict(shift=1.0),
  dict(shift=3.0),
  dict(shift=3.0, num_train_timesteps=500),
  dict(shift=3.0, shift_terminal=0.1),
  dict(use_dynamic_shifting=True),
  dict(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, max_image_seq_len=2048),
  dict(use_dynamic_shifting=True, time_shift_type="linear"),
]


@pytest.mark.parametrize("config,num_steps", itertools.product(FLOW_CONFIGS, [2, 7, 50]))
def test_flow_table_equals_diffusers(config, num_steps):
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
  mu = None
  if config.get("use_dynamic_shifting"):
    c = scheduler.config
    # The straight line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    ends = (c.base_image_seq_len, c.max_image_seq_len), (c.base_shift, c.max_shift)
    mu = float(np.polyval(np.polyfit(*ends, 1), 777))
  scheduler.set_timesteps(num_steps, mu=mu)
  named = dict(config, _class_name="FlowMatchEulerDiscreteScheduler")
  table = schedulers.from_config(named, num_steps, image_seq_len=777)
  sigmas = scheduler.sigmas.numpy()
  np.testing.assert_allclose(table.sigma_t, sigmas[:-1], rtol=2e-7)
  np.testing.assert_allclose(table.sigma_s, sigmas[1:], rtol=2e-7)
  np.testing.assert_allclose(table.t, scheduler.timesteps.numpy(), rtol=2e-7)
  np.testing.assert_array_equal(table.alpha_t, 1 - table.sigma_t)
  assert table.sigma_s[-1] == 0


def test_flow_table_of_the_flux_pipeline():
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
  scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 9, 9), mu=1.15)
  table = schedules.flow_table(9, mu=schedules.resolution_mu(4096), sigma_min=1 / 9)
  np.testing.assert_allclose(table.sigma_t, scheduler.sigmas.numpy()[:-1], rtol=2e-7)


def test_one_step_has_nothing_to_stretch():
  table = schedules.flow_table(1, shift=3.0, shift_terminal=0.02)
  assert (table.sigma_t[0], table.sigma_s[0], table.t[0]) == (1.0, 0.0, 1000.0)


def test_flow_shift_by_hand():
  # Without shift, two steps from 1 to 1/2; shift 3 takes 1/2 to 1.5 / 2 = 3/4.
  table = schedules.flow_table(2, shift=3.0, sigma_min=0.5)
  np.testing.assert_allclose(table.sigma_t, [1.0, 0.75])
  np.testing.assert_allclose(table.t, [1000.0, 750.0])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_from_config_reads_a_saved_config_and_its_defaults(name, tmp_path):
  scheduler = getattr(diffusers, name)()
  scheduler.save_pretrained(tmp_path)
  scheduler.set_timesteps(10)
  saved = json.loads((tmp_path / "scheduler_config.json").read_text())
  table = schedulers.from_config(saved, 10)
  np.testing.assert_array_equal(table.t, scheduler.timesteps.numpy())
  bare = schedulers.from_config({"_class_name": name}, 10)
  jax.tree.map(np.testing.assert_array_equal, table, bare)


SOLVERS = [
  "PNDMScheduler",
  "EulerDiscreteScheduler",
  "EulerAncestralDiscreteScheduler",
  "LMSDiscreteScheduler",
  "DEISMultistepScheduler",
  "DPMSolverMultistepScheduler",
  "DPMSolverSinglestepScheduler",
  "UniPCMultistepScheduler",
  "HeunDiscreteScheduler",
  "KDPM2DiscreteScheduler",
  "KDPM2AncestralDiscreteScheduler",
  "SASolverScheduler",
]
# The scheduler_config.json of published models, without what only their solvers read.
PUBLISHED = {
  "stable-diffusion-v1-5": dict(SD1_SCHEDULE, _class_name="PNDMScheduler", skip_prk_steps=True),
  "stable-diffusion-2-1": dict(
    SD1_SCHEDULE, _class_name="DDIMScheduler", clip_sample=False, prediction_type="v_prediction"
  ),
  "stable-diffusion-xl-base-1.0": dict(
    SD1_SCHEDULE,
    _class_name="EulerDiscreteScheduler",
    interpolation_type="linear",
    timestep_spacing="leading",
    use_karras_sigmas=False,
  ),
  # What DDIMScheduler.from_config keeps of the solver's config that it was made of.
  "DDIM in the place of a solver": dict(
    SD1_SCHEDULE, _class_name="DDIMScheduler", use_karras_sigmas=True, algorithm_type="dpmsolver++"
  ),
  "instruct-pix2pix": dict(SD1_SCHEDULE, _class_name="EulerAncestralDiscreteScheduler"),
  "sd-turbo": dict(SD1_SCHEDULE, _class_name="EulerDiscreteScheduler", timestep_spacing="trailing"),
  "a zero-SNR velocity model": dict(
    SD1_SCHEDULE,
    _class_name="DPMSolverMultistepScheduler",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    use_karras_sigmas=True,
    variance_type=None,
  ),
}


def assert_is_ddim(table, scheduler):
  """The table is that of diffusers' DDIM in the place of another scheduler, on its noise levels."""
  own = {name: scheduler.config[name] for name in ("beta_start", "beta_end")}
  ddim = diffusers.DDIMScheduler.from_config(scheduler.config, **own)
  ddim.set_timesteps(table.num_steps)
  t = ddim.timesteps.numpy()
  np.testing.assert_array_equal(table.t, t)
  square_s = [previous_square(ddim, int(i)) for i in t]
  np.testing.assert_allclose(table.alpha_t**2, ddim.alphas_cumprod.numpy()[t], atol=ZERO_SNR_ATOL)
  np.testing.assert_allclose(table.alpha_s**2, square_s, atol=ZERO_SNR_ATOL)


@pytest.mark.parametrize("name", SOLVERS)
def test_other_solvers_become_ddim_with_a_notice(name):
  with pytest.warns(UserWarning, match=f"{name} is sampled as DDIM"):
    table = schedulers.from_config({"_class_name": name}, 20)
  assert_is_ddim(table, getattr(diffusers, name)())


@pytest.mark.filterwarnings("ignore:scheduler config")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedulers(name):
  config = PUBLISHED[name]
  scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
  assert_is_ddim(schedulers.from_config(config, 20), scheduler)


def test_the_notice_is_printed_once():
  program = f"""
from jaxalign.diffusion import schedulers, transitions
config = {PUBLISHED["stable-diffusion-v1-5"]!r}
for num_steps in (5, 7):
  transitions.make_process(config, num_steps=num_steps, eta=1.0)
  schedulers.training_table(config)
"""
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert run.stderr.count("PNDMScheduler is sampled as DDIM") == 1
  assert "timestep_spacing='leading'" in run.stderr


@pytest.mark.parametrize(
  "config,message",
  [
    (dict(_class_name="LCMScheduler"), "LCMScheduler"),
    (dict(), "None"),
    (dict(_class_name="DDIMScheduler", thresholding=True), "thresholding"),
    (dict(_class_name="DDIMScheduler", trained_betas=[0.1]), "trained_betas"),
    (dict(_class_name="DDIMScheduler", beta_schedule="sigmoid"), "sigmoid"),
    (dict(_class_name="DDIMScheduler", timestep_spacing="even"), "even"),
    (dict(_class_name="DDIMScheduler", steps_offset=1, num_train_timesteps=10), "timestep 10"),
    (dict(_class_name="DDIMScheduler", num_train_timesteps=9), "1 to 9"),
    (dict(_class_name="DDPMScheduler", variance_type="learned_range"), "learned_range"),
    (dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"), "timestep_type"),
    (dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas"),
    (
      dict(_class_name="FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True),
      "use_karras_sigmas",
    ),
    (
      dict(_class_name="FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
      "image_seq_len",
    ),
    (dict(_class_name="FlowMatchEulerDiscreteScheduler", time_shift_type="cubic"), "cubic"),
    (dict(_class_name="FlowMatchEulerDiscreteScheduler", invert_sigmas=True), "invert_sigmas"),
  ],
)
def test_what_is_not_supported_is_named(config, message):
  with pytest.raises(ValueError, match=message):
    schedulers.from_config(config, 10)


def test_training_table_rows_are_timesteps():
  config = dict(SD1_SCHEDULE, _class_name="DDIMScheduler", timestep_spacing="trailing")
  table = schedulers.training_table(config)
  abar = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
  np.testing.assert_array_equal(table.t, np.arange(1000))
  np.testing.assert_allclose(table.alpha_t**2, abar, rtol=1e-5)


@pytest.mark.parametrize("config", [dict(shift=3.0), dict(use_dynamic_shifting=True)])
def test_training_table_of_flow_equals_diffusers(config):
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
  named = dict(config, _class_name="FlowMatchEulerDiscreteScheduler")
  table = schedulers.training_table(named)
  np.testing.assert_allclose(table.sigma_t[::-1], scheduler.sigmas.numpy(), rtol=1e-6)


def test_add_noise_equals_diffusers():
  rng = np.random.default_rng(0)
  x_0, eps = rng.normal(size=(2, 3, 5, 7, 2)).astype(np.float32)
  t = np.array([0, 500, 999])
  scheduler = diffusers.DDIMScheduler(**SD1_SCHEDULE)
  theirs = scheduler.add_noise(torch.tensor(x_0), torch.tensor(eps), torch.tensor(t)).numpy()
  row = schedulers.training_table(dict(SD1_SCHEDULE, _class_name="DDIMScheduler"))[t]
  ours = schedules.add_noise(jnp.array(x_0), jnp.array(eps), row.alpha_t, row.sigma_t)
  np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_indexing_a_table():
  table = schedules.ddim_table(5, **SD1_SCHEDULE)
  assert table[2].t.shape == ()
  assert table[1:].num_steps == 4
  i = jnp.array([4, 0, 4])
  rows = jax.jit(lambda i: table[i])(i)
  np.testing.assert_array_equal(rows.sigma_t, table.sigma_t[[4, 0, 4]])
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rows))


def test_a_log_snr_table_has_equal_steps_and_times_that_give_its_levels_back():
  table = schedules.log_snr_table(14)
  np.testing.assert_allclose(table.alpha_t**2 + table.sigma_t**2, 1.0, rtol=1e-6)
  log_snr = 2.0 * np.log(table.alpha_t / table.sigma_t)
  np.testing.assert_allclose(log_snr, np.arange(-7, 7), atol=1e-5)
  np.testing.assert_allclose(table.t, 1000.0 * np.arange(14, 0, -1) / 14, rtol=1e-6)
  np.testing.assert_array_equal(table.alpha_s, np.append(table.alpha_t[1:], 1.0).astype("f"))
  assert table.sigma_s[-1] == 0.0
  alpha, sigma = schedules.log_snr_levels(table.t)
  np.testing.assert_allclose(alpha, table.alpha_t, rtol=1e-5)
  np.testing.assert_allclose(sigma, table.sigma_t, rtol=1e-5)


def test_a_uniform_flow_has_steps_of_one_size():
  table = schedules.uniform_flow_table(4)
  np.testing.assert_allclose(table.sigma_t, [1.0, 0.75, 0.5, 0.25])
  np.testing.assert_allclose(table.sigma_s, [0.75, 0.5, 0.25, 0.0])
  for make in (schedules.uniform_flow_table, schedules.log_snr_table):
    with pytest.raises(ValueError, match="num_steps: expected at least 1; got 0"):
      make(0)
