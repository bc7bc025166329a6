"""Stable Diffusion 3: what its folders may hold, and what is refused."""

import shutil
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxalign import files
from jaxalign.models import families
from jaxalign.models.adapters import policy


def open_quietly(folder, **options):
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*assumed or corrected")
    return families.open_model(folder, **{"text_length": 8, **options})


def read(model):
  return jax.tree.map(np.asarray, dict(model.params))


def test_the_table_of_positions_is_not_trained(small_sd3):
  shapes = open_quietly(small_sd3, shapes_only=True).params["denoiser"]
  make = {"rank": 0, "alpha": 1.0, "targets": ""}
  found = policy.make_policy(shapes, jax.random.key(0), **make)
  assert list(found.base["params"]["pos_embed"]) == ["pos_embed"]
  assert list(found.params["params"]["pos_embed"]) == ["proj"]
  assert list(found.base["params"]) == ["pos_embed"]


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
