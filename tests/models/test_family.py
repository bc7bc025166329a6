"""Every kind of Stable Diffusion, from a saved folder to images, against diffusers itself."""

import dataclasses
import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import small_models
import torch

from jaxalign import system
from jaxalign.diffusion import guidance, rollout, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.models.families import stable_diffusion

torch.set_num_threads(1)
PROMPTS = ["a cat", "dog dog cat a b"]
SIZES = [(16, 16), (16, 24)]
# Networks and autoencoders have both sizes in the default suite, the whole way the oblong one.
SLOW_SQUARE = [pytest.param(SIZES[0], marks=pytest.mark.slow), SIZES[1]]
TEXT_KINDS = ["sd1", "sd2", "xl"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """`saved(kind)`: a random model and the folder it was saved to, made once."""

  @functools.cache
  def make(kind):
    model = small_models.make(kind, tmp_path_factory.mktemp(kind))
    folder = tmp_path_factory.mktemp(kind) / "model"
    stable_diffusion.save(model, folder)
    return model, folder

  return make


@pytest.fixture(scope="module")
def oracle(saved):
  """`oracle(kind)`: the pipeline that diffusers makes of the folder."""

  @functools.cache
  def load(kind):
    index = json.loads((saved(kind)[1] / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(saved(kind)[1])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

  return load


def nchw(x):
  return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x):
  return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(found, expected, tolerance=1e-4):
  """The largest error relative to the spread of the values, which must have one."""
  expected = np.asarray(expected.detach() if isinstance(expected, torch.Tensor) else expected)
  assert np.shape(found) == expected.shape
  assert expected.std() > 0.05
  error = np.abs(np.asarray(found) - expected).max() / expected.std()
  print(f"error {error:.1e}, spread {expected.std():.2g}")
  assert error < tolerance


def assert_images_close(found, expected):
  error = np.abs(np.asarray(found) - expected).max()
  print(f"error {error:.1e}, spread {expected.std():.2g}")
  assert error < 2e-3
  assert expected.std() > 0.05 and np.mean((expected > 0) & (expected < 1)) > 0.5


def torch_cond(pipeline, size):
  """What the pipeline tells its UNet of `PROMPTS`: text states, and for XL what is added."""
  with torch.no_grad():
    if "XL" not in type(pipeline).__name__:
      return pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0], None
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu")
    time_ids = pipeline._get_add_time_ids(size, (0, 0), size, text.dtype, pooled.shape[-1])
  return text, {"text_embeds": pooled, "time_ids": time_ids.repeat(len(PROMPTS), 1)}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_text_encoders_and_unet_match_diffusers(kind, size, saved, oracle):
  model, pipeline = saved(kind)[0].with_image_size(*size), oracle(kind)
  x_t = np.random.default_rng(1).standard_normal((2, *model.latent_shape), np.float32)
  t = np.array([3.0, 981.0], np.float32)
  cond = jax.jit(model.encode_text)(model.params, model.tokenize(PROMPTS))
  found = jax.jit(model.denoise)({"params": model.params["unet"]}, x_t, t, cond)

  text, added = torch_cond(pipeline, size)
  with torch.no_grad():
    expected = pipeline.unet(nchw(x_t), torch.from_numpy(t), text, added_cond_kwargs=added).sample
  assert_close(cond["text"], text)
  if added:
    assert_close(cond["text_embeds"], added["text_embeds"])
    np.testing.assert_array_equal(cond["time_ids"], added["time_ids"])
  assert_close(found, nhwc(expected))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_autoencoder_matches_diffusers(kind, size, saved, oracle):
  model, pipeline = saved(kind)[0], oracle(kind)
  images = np.random.default_rng(2).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
  mean, log_var = jax.jit(model.vae_moments)(model.params["vae"], images)
  decoded = jax.jit(model.vae_decode)(model.params["vae"], mean)
  with torch.no_grad():
    posterior = pipeline.vae.encode(nchw(images)).latent_dist
    expected = pipeline.vae.decode(posterior.mean).sample
  assert_close(mean, nhwc(posterior.mean))
  assert_close(log_var, nhwc(posterior.logvar))
  assert_close(decoded, nhwc(expected))


@pytest.mark.parametrize("size", SLOW_SQUARE, ids=str)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_images_match_diffusers(kind, size, saved, oracle):
  """The whole way with guidance, for XL with the zeros that stand for the empty prompt."""
  steps = 7
  sys_ = system.make_system(
    seed=0,
    model={"path": saved(kind)[1], "image_size": size},
    lora=system.NO_LORA,
    process={"transition": "ddim", "num_steps": steps, "eta": 0.0},
    guidance={"scale": 4.0},
  )
  latents = np.random.default_rng(3).standard_normal((2, *sys_.model.latent_shape), np.float32)
  found = jax.jit(sys_.sample)(
    sys_.policy.params,
    sys_.frozen,
    sys_.model.tokenize([{"prompt": prompt} for prompt in PROMPTS]),
    latents,
    jax.random.key(0),
    sys_.pipeline.table,
  ).samples
  expected = oracle(kind)(
    PROMPTS,
    latents=nchw(latents),
    height=size[0],
    width=size[1],
    num_inference_steps=steps,
    guidance_scale=4.0,
    eta=0.0,
    output_type="np",
  ).images
  assert_images_close(found, expected)


@pytest.mark.parametrize("flag", [True, False])
def test_the_empty_prompt_matches_diffusers(flag, saved, oracle):
  """XL's unconditional branch, whichever way model_index.json says it is made."""
  model, pipeline = saved("xl")[0], oracle("xl")
  text = dataclasses.replace(model.networks.text, zero_empty=flag)
  networks = dataclasses.replace(model.networks, text=text)
  found = jax.jit(networks.encode_text)(model.params, model.tokenize([""]))
  before = pipeline.config.force_zeros_for_empty_prompt
  pipeline.register_to_config(force_zeros_for_empty_prompt=flag)
  with torch.no_grad():
    _, text, _, pooled = pipeline.encode_prompt("a", device="cpu")
  pipeline.register_to_config(force_zeros_for_empty_prompt=before)
  np.testing.assert_allclose(found["text"], text, atol=1e-4)
  np.testing.assert_allclose(found["text_embeds"], pooled, atol=1e-4)
  assert before and bool(text.any()) != flag


def test_edited_images_match_diffusers(saved, oracle):
  """InstructPix2Pix: the image to edit goes in beside the noise, and has a scale of its own."""
  size = SIZES[1]
  steps, model = 5, saved("pix2pix")[0].with_image_size(*size)
  process = transitions.make_process(model.scheduler_config, num_steps=steps, eta=0.0)
  denoise = guidance.text_and_image(model.denoise, 4.0, 1.5)
  rng = np.random.default_rng(4)
  images = rng.uniform(size=(2, *size, 3)).astype(np.float32)
  latents = rng.standard_normal((2, *model.latent_shape), np.float32)

  @jax.jit
  def edit(params, ids, images, latents):
    text = model.encode_text(params, ids)["text"]
    image, _ = model.vae_moments(params["vae"], 2.0 * images - 1.0)
    cond = guidance.Guided(
      {"text": text[:-1], "image": image}, {"text": text[-1:], "image": 0.0 * image[:1]}
    )
    variables = {"params": params["unet"]}
    kernel = Kernel(denoise, process.transition)
    args = (process.table, latents, cond, mean_over_latents)
    rolled = rollout.rollout(jax.random.key(0), kernel, variables, *args)
    return model.decode(params["vae"], rolled.x_0)

  found = edit(model.params, model.tokenize([*PROMPTS, ""]), images, latents)
  pipeline = oracle("pix2pix")
  pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
  expected = pipeline(
    PROMPTS,
    image=nchw(images),
    latents=nchw(latents),
    num_inference_steps=steps,
    guidance_scale=4.0,
    image_guidance_scale=1.5,
    output_type="np",
  ).images
  assert_images_close(found, expected)
