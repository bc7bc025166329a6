"""Stable Diffusion 3 as a model: its folder read and written, and diffusers' pipeline beside it."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_flows

from jaxalign import files
from jaxalign.diffusion import guidance, kernel
from jaxalign.models import families
from jaxalign.models.adapters import policy

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


def test_the_table_of_positions_is_not_trained(small_sd3):
  shapes = open_quietly(small_sd3, shapes_only=True).params["denoiser"]
  make = {"rank": 0, "alpha": 1.0, "targets": ""}
  found = policy.make_policy(shapes, jax.random.key(0), **make)
  assert list(found.base["params"]["pos_embed"]) == ["pos_embed"]
  assert list(found.params["params"]["pos_embed"]) == ["proj"]
  assert list(found.base["params"]) == ["pos_embed"]


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


# What is changed in which file of a folder, and the words of the refusal.
ODD = {
  "a foreign part": ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "one with unet"),
  "a missing part": ("model_index.json", {"vae": [None, None]}, "one without vae"),
  "another network": (
    "model_index.json",
    {"transformer": ["diffusers", "FluxTransformer2DModel"]},
    "expected transformer of class SD3Transformer2DModel, found 'FluxTransformer2DModel'",
  ),
  "a config of another class": (
    "vae/config.json",
    {"_class_name": "AutoencoderTiny"},
    "expected vae of class AutoencoderKL",
  ),
  "a scheduler of diffusion": (
    "model_index.json",
    {"scheduler": ["diffusers", "DDIMScheduler"]},
    "expected the scheduler of a rectified flow",
  ),
  "a misspelled field": (
    "transformer/config.json",
    {"num_layer": 2},
    'did you mean "num_layers"',
  ),
  "another kind of value": ("transformer/config.json", {"num_layers": "2"}, "num_layers"),
  "latents of another width": (
    "vae/config.json",
    {"latent_channels": 4},
    "in_channels == out_channels == vae latent_channels, found 3, 3 and 4",
  ),
  "prompts of another width": (
    "transformer/config.json",
    {"pooled_projection_dim": 15},
    "pooled_projection_dim == projection_dim of both CLIPs together, found 15 and 16",
  ),
  "texts of another width": (
    "transformer/config.json",
    {"joint_attention_dim": 20},
    "joint_attention_dim of the transformer",
  ),
  "more layers than there are": (
    "transformer/config.json",
    {"num_layers": 3},
    "does not fit its config.json",
  ),
}


@pytest.mark.parametrize("what", ODD)
def test_folders_that_do_not_fit_are_refused(small_sd3, what, tmp_path):
  name, change, words = ODD[what]
  model = shutil.copytree(small_sd3, tmp_path / "model")
  files.write_json(model / name, {**files.read_json(model / name), **change})
  with pytest.raises(ValueError, match=words) as error:
    open_quietly(model)
  assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("both", [True, False])
def test_a_t5_whose_table_has_two_names_or_the_other_one(small_sd3, both, tmp_path):
  """FLUX.1's folder has both; transformers writes one (it ties them)."""
  model = shutil.copytree(small_sd3, tmp_path / "model")
  file = model / "text_encoder_3" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  table = tensors["shared.weight"] if both else tensors.pop("shared.weight")
  tensors["encoder.embed_tokens.weight"] = table
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  found = read(open_quietly(model))["text_encoder_3"]["shared"]["embedding"]
  np.testing.assert_array_equal(found, table)


def test_options_that_do_not_fit_are_refused(small_sd3):
  with pytest.raises(ValueError, match=r"image size: expected multiples of 4.*got 8 x 6"):
    open_quietly(small_sd3, image_size=(8, 6))
  with pytest.raises(ValueError, match="text_length: expected at least 1"):
    open_quietly(small_sd3, text_length=0)
  with pytest.raises(ValueError, match="vae_dtype"):
    open_quietly(small_sd3, vae_dtype="float16")
  with pytest.raises(ValueError, match=r"param_dtype: expected float32"):
    open_quietly(small_sd3, param_dtype="bfloat16")


def test_bfloat16_is_near_float32_and_frozen_weights_are_stored_in_it(small_sd3):
  full = open_quietly(small_sd3)
  half = open_quietly(small_sd3, dtype="bfloat16", param_dtype="bfloat16")
  assert (full.dtype, half.dtype) == (None, "bfloat16") and full.exact is None
  params = read(full)
  variables = {"params": params["denoiser"]}
  x_t = np.random.default_rng(0).standard_normal((1, *full.latent_shape), np.float32)
  cond = jax.jit(full.condition)(params, full.tokenize([{"prompt": "a cat"}]))
  t = np.array([700.0], np.float32)
  expected, found, exact = (
    np.asarray(jax.jit(denoise)(variables, x_t, t, cond))
    for denoise in (full.denoise, half.denoise, half.exact)
  )
  np.testing.assert_array_equal(exact, expected)
  assert found.dtype == np.float32
  assert 0.0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
  stored = half.stored_dtypes(variables)["params"]
  assert stored["proj_out"]["kernel"] == jnp.bfloat16
  assert stored["pos_embed"]["pos_embed"] == jnp.float32
