"""Stable Diffusion 3 as a model: its folder read and written, and diffusers' pipeline beside it."""

import warnings

import jax
import numpy as np
import pytest
import small_flows

from jaxalign.diffusion import guidance, kernel
from jaxalign.models import families

SIZE = (8, 16)  # in pixels, not square


@pytest.fixture(scope="module", params=small_flows.KINDS)
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
  return small_flows.write(kind, tmp_path_factory.mktemp("sd3") / "model")


def open_quietly(folder, **options):
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*assumed or corrected")
    return families.open_model(folder, **{"text_length": 8, **options})


def read(model):
  return jax.tree.map(np.asarray, dict(model.params))


def test_a_saved_folder_is_read_to_the_bit(folder, tmp_path):
  model = open_quietly(folder)
  again = tmp_path / "again"
  model.files.save(read(model), again)
  found = {
    path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()
  }
  expected = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  assert found == expected
  shapes = open_quietly(folder, shapes_only=True).params
  assert jax.tree.map(np.shape, dict(shapes)) == jax.tree.map(np.shape, read(model))


def sample(model, params, prompts, negative, noise, num_steps, scale):
  """What our sampler makes of the same noise, in pixels."""
  cond, uncond = (
    model.condition(params, model.tokenize([{"prompt": text} for text in texts]))
    for texts in (prompts, negative)
  )
  process = model.make_process(num_steps=num_steps, transition="euler")
  denoise = guidance.classifier_free(model.denoise, scale)
  steps = kernel.Kernel(denoise, process.transition)
  x, variables = noise, {"params": params["denoiser"]}
  for i in range(num_steps):
    row = kernel.for_all(process.table[i], len(noise))
    x, _ = steps.moments(variables, x, row, guidance.Guided(cond, uncond))  # std is 0
  return model.decode(params, x)


def test_diffusers_makes_the_same_images(folder):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  absent = [name for name in ("text_encoder_3", "tokenizer_3") if not (folder / name).exists()]
  none = dict.fromkeys(absent)  # which diffusers wants to be told
  pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **none)
  pipeline.set_progress_bar_config(disable=True)
  model = open_quietly(folder, image_size=SIZE)
  noise = np.random.default_rng(3).standard_normal((2, *model.latent_shape), np.float32)
  prompts, negative = ["a cat", "dog a"], ["dog", ""]
  expected = pipeline(
    prompts,
    negative_prompt=negative,
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=3,
    guidance_scale=2.5,
    latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
    max_sequence_length=8,
    output_type="np",
  ).images
  params = read(model)
  actual = jax.jit(
    lambda params, noise: sample(model, params, prompts, negative, noise, 3, 2.5)
  )(params, noise)
  assert actual.shape == expected.shape == (2, *SIZE, 3)
  assert np.ptp(expected) > 0.3
  np.testing.assert_allclose(actual, expected, atol=2e-3)
