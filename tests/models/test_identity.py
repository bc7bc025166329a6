"""Old and odd folders: what is corrected in their configs, against what diffusers makes of them."""

import functools
import inspect
import json
import re
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import diffusers
import jax
import numpy as np
import pytest
import small_models
import torch

from jaxalign import system
from jaxalign.diffusion import schedulers
from jaxalign.models.families import stable_diffusion, stable_diffusion_networks
from jaxalign.models.identity import classes, fields, folders

torch.set_num_threads(1)
BETAS = {
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "num_train_timesteps": 1000,
}
GONE = "(not there)"  # in a change: the field is taken out
EMA = {
  "decay": 0.9999,
  "inv_gamma": 1.0,
  "min_decay": 0.0,
  "optimization_step": 500,
  "power": 0.75,
  "update_after_step": 0,
  "use_ema_warmup": False,
}


class Case(NamedTuple):
  """A folder: a kind of small model, its whole scheduler config, and changes to its others.

  said: of the notes, by component, all together; "" where there is none.
  """

  said: str
  scheduler: Mapping | None = None
  unet: Mapping = MappingProxyType({})
  vae: Mapping = MappingProxyType({})
  index: Mapping = MappingProxyType({})
  kind: str = "sd1"


def scheduler(name, **fields):
  return {"_class_name": name, **BETAS, **fields}


def of(pipeline_class, scheduler_class=None):
  entry = {} if scheduler_class is None else {"scheduler": ["diffusers", scheduler_class]}
  return {"_class_name": pipeline_class, **entry}


NEW_DDIM = scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
OLD_DDIM = scheduler("DDIMScheduler", set_alpha_to_one=False)
OFFSET, CLIPPED = "steps_offset absent -> 1", "clip_sample absent -> false"
BOTH = f"scheduler: {OFFSET}; scheduler: {CLIPPED}"

CASES = {
  # As published by versions of diffusers and scripts of training.
  "1.4 of diffusers 0.2": Case(
    "unet: sample_size 32 -> 64; vae: scaling_factor absent -> 0.18215; scheduler: " + OFFSET,
    scheduler("PNDMScheduler", skip_prk_steps=True, _diffusers_version="0.2.2"),
    unet={"sample_size": 32, "_diffusers_version": "0.2.2"},
    vae={"scaling_factor": GONE, "_diffusers_version": "0.2.2"},
  ),
  "1.5 of diffusers 0.6": Case(
    "",
    scheduler(
      "PNDMScheduler",
      _diffusers_version="0.6.0",
      clip_sample=False,
      set_alpha_to_one=False,
      skip_prk_steps=True,
      steps_offset=1,
      trained_betas=None,
    ),
    unet={"sample_size": 64, "_diffusers_version": "0.6.0"},
  ),
  "2.1": Case("", {**NEW_DDIM, "prediction_type": "v_prediction"}, kind="sd2"),
  "2.x of an old script": Case(BOTH, {**OLD_DDIM, "prediction_type": "v_prediction"}, kind="sd2"),
  "2.x with zero SNR": Case(
    "scheduler: clip_sample true -> false; scheduler: steps_offset 0 -> 1",
    scheduler(
      "DDIMScheduler",
      clip_sample=True,
      prediction_type="v_prediction",
      rescale_betas_zero_snr=True,
      steps_offset=0,
      timestep_spacing="trailing",
    ),
    kind="sd2",
  ),
  "XL base": Case(
    "",
    scheduler(
      "EulerDiscreteScheduler",
      clip_sample=False,
      interpolation_type="linear",
      prediction_type="epsilon",
      sample_max_value=1.0,
      set_alpha_to_one=False,
      skip_prk_steps=True,
      steps_offset=1,
      timestep_spacing="leading",
      trained_betas=None,
      use_karras_sigmas=False,
    ),
    kind="xl",
  ),
  "a script's DDPM": Case(
    "scheduler: clip_sample true -> false; scheduler: steps_offset absent -> 1",
    scheduler("DDPMScheduler", clip_sample=True, variance_type="fixed_small"),
  ),
  "a script's DDPM of few words": Case(BOTH, scheduler("DDPMScheduler")),
  # clip_sample and steps_offset, one by one.
  "clip_sample true": Case(
    "scheduler: clip_sample true -> false", {**NEW_DDIM, "clip_sample": True}
  ),
  "clip_sample absent": Case(f"scheduler: {CLIPPED}", {**OLD_DDIM, "steps_offset": 1}),
  "clip_sample null": Case(
    "scheduler: clip_sample null -> false", {**NEW_DDIM, "clip_sample": None}
  ),
  "steps_offset 0": Case("scheduler: steps_offset 0 -> 1", {**NEW_DDIM, "steps_offset": 0}),
  "steps_offset absent": Case(f"scheduler: {OFFSET}", {**OLD_DDIM, "clip_sample": False}),
  "steps_offset null": Case(
    "scheduler: steps_offset null -> 1", {**NEW_DDIM, "steps_offset": None}
  ),
  # Other solvers, which are sampled as DDIM on the same levels.
  "Euler": Case(f"scheduler: {OFFSET}", scheduler("EulerDiscreteScheduler")),
  "Euler, linspace": Case(
    "scheduler: steps_offset 0 -> 1",
    scheduler("EulerDiscreteScheduler", steps_offset=0, timestep_spacing="linspace"),
  ),
  "Euler ancestral": Case(
    "scheduler: clip_sample true -> false",
    scheduler("EulerAncestralDiscreteScheduler", clip_sample=True, steps_offset=1),
  ),
  "LMS": Case(f"scheduler: {OFFSET}", scheduler("LMSDiscreteScheduler")),
  "DPM-Solver++": Case(
    "scheduler: steps_offset 0 -> 1",
    scheduler("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", steps_offset=0),
  ),
  "UniPC": Case(f"scheduler: {OFFSET}", scheduler("UniPCMultistepScheduler")),
  "DEIS, Karras": Case(
    f"scheduler: {OFFSET}", scheduler("DEISMultistepScheduler", use_karras_sigmas=True)
  ),
  "Heun of few words": Case(
    f"scheduler: {OFFSET}",
    {"_class_name": "HeunDiscreteScheduler", "beta_schedule": "scaled_linear"},
  ),
  "KDPM2 of few words": Case(
    f"scheduler: {OFFSET}",
    {"_class_name": "KDPM2DiscreteScheduler", "beta_schedule": "scaled_linear"},
  ),
  "SA-Solver": Case(f"scheduler: {OFFSET}", scheduler("SASolverScheduler")),
  "parallel DDIM": Case(BOTH, {**OLD_DDIM, "_class_name": "DDIMParallelScheduler"}),
  "parallel DDPM": Case(BOTH, scheduler("DDPMParallelScheduler")),
  # Two names, or none, for the class of the scheduler (huggingface/diffusers#7183).
  "DDIM in the index, PNDM in the config": Case(
    f"scheduler: _class_name PNDMScheduler -> DDIMScheduler; {BOTH}",
    scheduler("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
    index=of("StableDiffusionPipeline", "DDIMScheduler"),
  ),
  "PNDM in the index, DDIM in the config": Case(
    "scheduler: _class_name DDIMScheduler -> PNDMScheduler; scheduler: clip_sample true -> false",
    {**NEW_DDIM, "clip_sample": True},
    index=of("StableDiffusionPipeline", "PNDMScheduler"),
  ),
  "no class in the config": Case(
    f"scheduler: _class_name absent -> DDIMScheduler; {BOTH}",
    BETAS,
    index=of("StableDiffusionPipeline", "DDIMScheduler"),
  ),
  # Sizes.
  "UNet of 0.8": Case(
    "unet: sample_size 32 -> 64", unet={"sample_size": 32, "_diffusers_version": "0.8.1"}
  ),
  "UNet of 0.9": Case("", unet={"sample_size": 32, "_diffusers_version": "0.9.0"}),
  "oblong UNet of 0.8": Case("", unet={"sample_size": [8, 12], "_diffusers_version": "0.8.0.dev0"}),
  "UNet of no version": Case("", unet={"sample_size": 32}),
  "XL of 0.8": Case("", unet={"sample_size": 32, "_diffusers_version": "0.8.0"}, kind="xl"),
  # huggingface/diffusers#6753, vladmandic/sdnext#2824: washed out, as diffusers would have it.
  "XL without scaling_factor": Case(
    "vae: scaling_factor absent -> 0.18215", vae={"scaling_factor": GONE}, kind="xl"
  ),
  # Pipelines that correct other fields, or none.
  "image to image": Case(BOTH, OLD_DDIM, index=of("StableDiffusionImg2ImgPipeline")),
  "perturbed attention": Case(BOTH, OLD_DDIM, index=of("StableDiffusionPAGPipeline")),
  "inpainting by text alone": Case(
    f"scheduler: {OFFSET}; scheduler: skip_prk_steps absent -> true",
    scheduler("PNDMScheduler"),
    index=of("StableDiffusionInpaintPipeline"),
  ),
  "inpainting, DDIM": Case(
    f"scheduler: {OFFSET}; scheduler: clip_sample stays true",
    OLD_DDIM,
    index=of("StableDiffusionInpaintPipeline"),
  ),
  "self-attention guidance": Case(
    "scheduler: clip_sample stays true", OLD_DDIM, index=of("StableDiffusionSAGPipeline")
  ),
  "instruct": Case("scheduler: clip_sample stays true", OLD_DDIM, kind="pix2pix"),
  "XL, DDIM of few words": Case("scheduler: clip_sample stays true", OLD_DDIM, kind="xl"),
  # Fields that change nothing.
  "an averaged UNet": Case(
    "unet: left out decay, inv_gamma, min_decay, optimization_step, power, and 2 more", unet=EMA
  ),
  "nulls as XL's": Case("", unet={"upcast_attention": None, "num_attention_heads": None}),
  "nulls for no": Case(
    "unet: dual_cross_attention null -> false; unet: resnet_skip_time_act null -> false",
    unet={"dual_cross_attention": None, "resnet_skip_time_act": None},
  ),
  "later fields": Case(
    "unet: left out later_option, later_path; vae: left out later_switch",
    unet={"later_option": None, "later_path": False},
    vae={"later_switch": None},
  ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """`saved(kind)`: the folder of a random model, made once."""

  @functools.cache
  def make(kind):
    folder = tmp_path_factory.mktemp(kind) / "model"
    stable_diffusion.save(small_models.make(kind, tmp_path_factory.mktemp(kind)), folder)
    return folder

  return make


@pytest.fixture(scope="module")
def components(saved):
  """`components(kind)`: diffusers' networks of an unchanged folder, loaded once."""

  @functools.cache
  def load(kind):
    index = json.loads((saved(kind) / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(saved(kind))
    return {name: part for name, part in pipeline.components.items() if part is not None}

  return load


def changed(file, change):
  content = {**json.loads(file.read_text()), **change}
  file.write_text(json.dumps({name: x for name, x in content.items() if x != GONE}))


def write(case, source, folder):
  """The folder of a case."""
  shutil.copytree(source, folder)
  changed(folder / "unet" / "config.json", case.unet)
  changed(folder / "vae" / "config.json", case.vae)
  index = case.index
  if case.scheduler is not None:
    (folder / folders.SCHEDULER).write_text(json.dumps(case.scheduler))
    name = case.scheduler.get("_class_name")
    index = index if "scheduler" in index else {**index, "scheduler": ["diffusers", name]}
  changed(folder / "model_index.json", index)
  return folder


def oracle(case, folder, components):
  """What diffusers' own pipeline makes of the folder; networks that are the same are shared."""
  own = {"unet": case.unet, "vae": case.vae, "scheduler": True}
  shared = {name: part for name, part in components.items() if not own.get(name)}
  name = json.loads((folder / "model_index.json").read_text())["_class_name"]
  optional = {} if case.kind in ("xl", "pix2pix") else {"requires_safety_checker": False}
  return getattr(diffusers, name).from_pretrained(folder, **shared, **optional)


def as_sampled(scheduler):
  """The scheduler, or DDIM on the noise levels and the grid of one whose steps have no density."""
  if type(scheduler).__name__.startswith(("DDIM", "DDPM")):
    return scheduler
  # `from_config` leaves out what a file did not say, though the pipeline has corrected it.
  fields = ("beta_start", "beta_end", "beta_schedule", "steps_offset")
  own = {name: scheduler.config[name] for name in fields if name in scheduler.config}
  return diffusers.DDIMScheduler.from_config(scheduler.config, **own)


@pytest.mark.parametrize("name", classes.PIPELINES)
def test_each_pipeline_corrects_what_diffusers_corrects(name):
  """By the source of diffusers: the fields that a class sets in the configs it is given."""
  source = inspect.getsource(getattr(diffusers, name).__init__)
  assert set(classes.PIPELINES[name]) == set(re.findall(r'new_config\["(\w+)"\]', source))


def note_words(notes):
  return "; ".join(f"{note.component}: {note.what}" for note in notes)


@pytest.mark.filterwarnings("ignore:scheduler config")
@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_what_diffusers_makes_of_it(name, saved, components, tmp_path):
  case = CASES[name]
  folder = write(case, saved(case.kind), tmp_path / "model")
  found = folders.read(folder)
  expected = oracle(case, folder, components(case.kind))

  config = found.configs["scheduler"]
  for field in ("steps_offset", "clip_sample", "skip_prk_steps", "prediction_type"):
    if field in config and field in expected.scheduler.config:
      assert (config[field] or False) == (expected.scheduler.config[field] or False), field
  clipped = bool(expected.scheduler.config.get("clip_sample"))
  assert schedulers.clips(config) == (clipped and hasattr(expected.scheduler, "_threshold_sample"))
  sampled = as_sampled(expected.scheduler)
  sampled.set_timesteps(7)
  table = schedulers.from_config(config, 7)
  np.testing.assert_array_equal(table.t, sampled.timesteps.numpy())
  levels = expected.scheduler.alphas_cumprod.numpy()
  np.testing.assert_allclose(table.alpha_t**2, levels[sampled.timesteps.numpy()], atol=3e-7)

  networks = stable_diffusion_networks.make(found.configs)
  assert networks.vae.config.scaling_factor == expected.vae.config.scaling_factor
  size = np.atleast_1d(expected.unet.config.sample_size) * expected.vae_scale_factor
  np.testing.assert_array_equal(networks.image_size, np.broadcast_to(size, 2))
  assert note_words(found.notes).startswith(case.said)
  assert bool(found.notes) == bool(case.said)


def test_the_picture_of_an_old_folder_is_that_of_diffusers(saved, components, tmp_path):
  """Latents are not confined to [-1, 1], whatever an old config says (kohya-ss/sd-scripts#1432)."""
  case = CASES["clip_sample true"]
  folder = write(case, saved("sd1"), tmp_path / "model")
  with pytest.warns(UserWarning, match="clip_sample true -> false"):
    sys_ = system.make_system(
      seed=0,
      model={"path": folder},
      lora=system.NO_LORA,
      process={"transition": "ddim", "num_steps": 4, "eta": 0.0},
      guidance={"scale": 4.0},
    )
  latents = np.random.default_rng(3).standard_normal((1, *sys_.model.latent_shape), np.float32)
  tokens = sys_.model.tokenize([{"prompt": "a cat"}])
  found = jax.jit(sys_.sample)(
    sys_.policy.params, sys_.frozen, tokens, latents, jax.random.key(0), sys_.pipeline.table
  ).samples
  pipeline = oracle(case, folder, components("sd1"))
  pipeline.set_progress_bar_config(disable=True)
  expected = pipeline(
    "a cat",
    latents=torch.from_numpy(latents).permute(0, 3, 1, 2),
    num_inference_steps=4,
    guidance_scale=4.0,
    output_type="np",
  ).images
  error = np.abs(np.asarray(found) - expected).max()
  print(f"error {error:.1e}")
  assert error < 2e-3 and expected.std() > 0.05


@pytest.mark.parametrize(
  ("component", "network"),
  [("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)],
)
def test_every_field_of_diffusers_is_read_or_refused(component, network):
  """None of them is among the unknown, which are taken to change nothing."""
  names = list(inspect.signature(network.__init__).parameters)[1:]
  assert len(names) > 10
  known = fields.COMPONENTS[component]
  assert fields.unknown(known, dict.fromkeys(names, 1)) == []
  assert fields.unknown(known, {"of_our_own": 1}) == ["of_our_own"]
