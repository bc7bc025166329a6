"""The bundle: its folder read back by us and by diffusers, its scaling, its tokens."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from jaxalign.models import tokenization
from jaxalign.models.families import stable_diffusion, stable_diffusion_networks

UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": [4, 6],
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": [8, 16],
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "cross_attention_dim": 12,
  "attention_head_dim": 2,
}
VAE = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": [4, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
  "norm_num_groups": 2,
  "scaling_factor": 0.5,
  "shift_factor": 0.25,
  "sample_size": 12,
}
TEXT = {
  "architectures": ["CLIPTextModel"],
  "model_type": "clip_text_model",
  "vocab_size": 60,
  "hidden_size": 12,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "max_position_embeddings": 8,
  "bos_token_id": 58,
  "eos_token_id": 59,
  "pad_token_id": 59,
}
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "clip_sample": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
}
COMPONENTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  tokenizer = small_models.write_tokenizer(tmp_path_factory.mktemp("source") / "tokenizer")
  built = stable_diffusion.build(
    unet=UNET, vae=VAE, text_encoder=TEXT, scheduler=SCHEDULER, tokenizer_folder=tokenizer
  )
  params = built.init_params(jax.random.key(0))
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  # Away from the initial zeros and ones, so that no swap of two parameters goes unseen.
  leaves = [np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  return built.with_params(jax.tree.unflatten(structure, leaves))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "model"
  stable_diffusion.save(model, path)
  return path


@pytest.fixture(scope="module")
def pipeline(folder):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_saved_model_loads_bit_exactly(model, folder):
  again = stable_diffusion.load(folder)
  assert again.configs == model.configs
  assert again.networks == model.networks
  assert again.scheduler_config == SCHEDULER
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_saving_over_its_own_folder_changes_nothing(folder):
  before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
  stable_diffusion.save(stable_diffusion.load(folder), folder)
  assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_diffusers_predicts_the_same(model, pipeline):
  import torch

  rng = np.random.default_rng(1)
  x_t = rng.normal(size=(2, 4, 6, 4)).astype(np.float32)
  t = np.array([3.0, 981.0], np.float32)
  token_ids = model.tokenize(["a cat", "dog"])
  cond = jax.jit(model.encode_text)(model.params, token_ids)
  prediction = jax.jit(model.denoise)({"params": model.params["unet"]}, x_t, t, cond)
  with torch.no_grad():
    hidden = pipeline.text_encoder(torch.from_numpy(token_ids).long())[0]
    sample = torch.from_numpy(x_t).permute(0, 3, 1, 2)
    expected = pipeline.unet(sample, torch.from_numpy(t), hidden).sample.permute(0, 2, 3, 1)
  assert list(cond) == ["text"]
  np.testing.assert_allclose(cond["text"], hidden, atol=1e-4, rtol=0)
  np.testing.assert_allclose(prediction, expected, atol=1e-4, rtol=0)


def test_diffusers_encodes_and_decodes_the_same(model, pipeline):
  import torch

  images = np.random.default_rng(2).uniform(size=(2, 8, 12, 3)).astype(np.float32)
  x_0 = jax.jit(model.encode_images)(model.params["vae"], images)
  decoded = jax.jit(model.decode)(model.params["vae"], x_0)
  with torch.no_grad():
    mean = pipeline.vae.encode(
      2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1
    ).latent_dist.mean
    expected = pipeline.vae.decode(mean).sample.mul(0.5).add(0.5).clamp(0, 1)
  expected_x_0 = (mean.permute(0, 2, 3, 1) - 0.25) * 0.5
  np.testing.assert_allclose(x_0, expected_x_0, atol=1e-4, rtol=0)
  np.testing.assert_allclose(decoded, expected.permute(0, 2, 3, 1), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:a prompt has")
def test_diffusers_has_the_same_tokenizer_and_scheduler(model, pipeline):
  prompts = ["a cat", "dog dog", "", "a cat cat cat cat cat cat cat cat"]
  expected = pipeline.tokenizer(prompts, padding="max_length", max_length=8, truncation=True)
  np.testing.assert_array_equal(model.tokenize(prompts), expected["input_ids"])
  assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
  assert pipeline.scheduler.config.steps_offset == 1


def test_tokens_by_hand(model, tmp_path):
  # a</w> is 28, ca 54, cat</w> 55, do 56, dog</w> 57, start 58, end 59.
  found = model.tokenize(["a cat", "DOG"])
  assert found.dtype == np.int32
  expected = [[58, 28, 55, 59, 59, 59, 59, 59], [58, 57, 59, 59, 59, 59, 59, 59]]
  np.testing.assert_array_equal(found, expected)
  other = small_models.write_tokenizer(tmp_path / "tokenizer", pad="!")
  np.testing.assert_array_equal(
    tokenization.tokenize(other, ["dog"], context_length=5, num_embeddings=60), [[58, 57, 59, 0, 0]]
  )
  assert model.tokenize([]).shape == (0, 8)
  with pytest.raises(ValueError, match=r"texts of 9 tokens.*found model_max_length 8") as error:
    tokenization.tokenize(other, ["dog"], context_length=9, num_embeddings=60)
  assert len(str(error.value).splitlines()) == 2


def test_truncation_is_reported_once(model, monkeypatch):
  monkeypatch.setattr(tokenization, "_truncation_warned", set())
  with pytest.warns(UserWarning, match="a prompt has 11 tokens, the text encoder reads 8"):
    found = model.tokenize(["cat " * 9, "dog"])
  np.testing.assert_array_equal(found[0], [58, 55, 55, 55, 55, 55, 55, 59])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    model.tokenize(["dog " * 30])


def test_encode_images_samples_the_posterior(model):
  params = model.params["vae"]
  images = np.random.default_rng(3).uniform(size=(1, 8, 12, 3)).astype(np.float32)
  key = jax.random.key(5)

  @jax.jit
  def encode(params, images):
    return model.vae_moments(params, 2 * images - 1), model.encode_images(params, images, key)

  (mean, log_var), found = encode(params, images)
  noise = jax.random.normal(key, mean.shape)
  expected = (mean + jnp.exp(log_var / 2) * noise - 0.25) * 0.5
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_shapes(model):
  assert model.latent_shape == (4, 6, 4)
  assert model.context_length == 8
  for size, expected in ((5, (5, 5, 4)), ([7], (7, 7, 4)), (None, (6, 6, 4))):
    configs = {**model.configs, "unet": {**UNET, "sample_size": size}}
    assert stable_diffusion_networks.make(configs).latent_shape == expected


def test_with_image_size(model, folder):
  other = model.with_image_size(16, 8)
  assert (other.latent_shape, other.image_size) == ((8, 4, 4), (16, 8))
  assert other.params is model.params and other.configs is model.configs
  assert stable_diffusion.load(folder, image_size=(16, 8)).networks == other.networks
  assert other.with_scaling_factor(2.0).image_size == (16, 8)
  with pytest.raises(ValueError, match=r"multiples of 2 pixels, got 16 x 7"):
    model.with_image_size(16, 7)


def test_init_params(model):
  first, again, other = (model.init_params(jax.random.key(seed)) for seed in (1, 1, 2))
  assert sorted(first) == sorted(COMPONENTS)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  kernel = first["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
  assert np.any(kernel != other["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"])
  assert kernel.shape == (3, 3, 16, 16)
  # Variance 1 / fan_in; 2304 draws estimate a standard deviation to 1.5 %.
  np.testing.assert_allclose(np.std(kernel), (9 * 16) ** -0.5, rtol=0.06)
  tokens = first["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
  np.testing.assert_allclose(np.std(tokens), 0.02, rtol=0.1)
  norm = first["vae"]["decoder"]["conv_norm_out"]
  np.testing.assert_array_equal(norm["scale"], np.ones(4))
  np.testing.assert_array_equal(norm["bias"], np.zeros(4))


def test_functions_capture_no_parameters(model):
  # Equal networks hash alike whatever parameters they come with, and hold no array at all.
  assert model.denoise.__self__ is model.networks
  assert hash(model.networks) == hash(model.with_params({}).networks)
  assert not [leaf for leaf in jax.tree.leaves(vars(model.networks)) if hasattr(leaf, "shape")]


def test_with_scaling_factor(model):
  other = model.with_scaling_factor(2.0)
  assert (other.scaling_factor, model.scaling_factor) == (2.0, 0.5)
  assert other.configs["vae"] == {**VAE, "scaling_factor": 2.0}
  assert other.params is model.params


@pytest.mark.parametrize(
  ("section", "change", "words"),
  [
    ("unet", {"in_channels": 3}, "== vae latent_channels, found 3, 4 and 4"),
    ("unet", {"out_channels": 5}, "== vae latent_channels, found 4, 5 and 4"),
    ("unet", {"cross_attention_dim": 16}, "hidden_size, found 16 and 12"),
    ("vae", {"act_fn": "mish"}, "mish"),
  ],
)
def test_components_that_do_not_fit(model, section, change, words):
  configs = {**model.configs, section: {**model.configs[section], **change}}
  with pytest.raises(ValueError, match=words):
    stable_diffusion.build(**configs, tokenizer_folder=model.tokenizer_folder)


def test_missing_tokenizer(model, tmp_path):
  with pytest.raises(ValueError, match=r"expected the tokenizer's .*vocab\.json"):
    stable_diffusion.build(**model.configs, tokenizer_folder=tmp_path)


@pytest.mark.parametrize(
  "name", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_missing_file_is_named(folder, name):
  hidden = (folder / name).rename(folder / "hidden")
  try:
    with pytest.raises(ValueError, match=f"expected the file .*{name}"):
      stable_diffusion.load(folder)
  finally:
    hidden.rename(folder / name)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "without tokenizer_2"),
    ({"text_encoder_3": ["transformers", "T5EncoderModel"]}, "with text_encoder_3"),
    ({"unet": [None, None]}, "without unet"),
  ],
)
def test_other_pipelines_are_refused(tmp_path, folder, change, words):
  index = json.loads((folder / "model_index.json").read_text())
  (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
  with pytest.raises(ValueError, match=f"StableDiffusionPipeline {words}"):
    stable_diffusion.load(tmp_path)


def test_save_needs_all_parameters_and_a_scheduler_class(model, tmp_path):
  target = tmp_path / "model"
  with pytest.raises(ValueError, match=r"none of \['text_encoder', 'unet'\]"):
    stable_diffusion.save(model.with_params({"vae": model.params["vae"]}), target)
  configs = {**model.configs, "scheduler": {"beta_start": 0.1}}
  nameless = stable_diffusion.build(**configs, tokenizer_folder=model.tokenizer_folder)
  with pytest.raises(ValueError, match="_class_name"):
    stable_diffusion.save(nameless.with_params(model.params), target)
  assert not target.exists()
