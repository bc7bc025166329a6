"""Tensors' original names, with diffusers' own conversion as the oracle."""

import numpy as np
import pytest
from original_files import TEXT, UNETS, VAE, to_original

from jaxalign.models.weights import original


def assert_same_tensors(found, expected):
  assert sorted(found) == sorted(expected)
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def to_torch(tensors):
  torch = pytest.importorskip("torch")
  return {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}


def randomize(module):
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.normal_()
  return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def oracle():
  pytest.importorskip("torch")
  return pytest.importorskip("diffusers.loaders.single_file_utils")


@pytest.mark.parametrize("kind", UNETS)
def test_unet_names_are_those_that_diffusers_converts(oracle, kind):
  import diffusers

  expected = randomize(diffusers.UNet2DConditionModel(**UNETS[kind]))
  file = to_original(expected, original.unet, "model.diffusion_model.")
  assert len(file) == len(expected)
  config = {"class_embed_type": None, "addition_embed_type": None, **UNETS[kind]}
  assert_same_tensors(oracle.convert_ldm_unet_checkpoint(to_torch(file), config), expected)
  assert "model.diffusion_model.input_blocks.1.0.in_layers.2.weight" in file


def test_vae_names_are_those_that_diffusers_converts(oracle):
  import diffusers

  expected = randomize(diffusers.AutoencoderKL(**VAE))
  file = to_original(expected, original.vae, "first_stage_model.")
  assert len(file) == len(expected)
  assert_same_tensors(oracle.convert_ldm_vae_checkpoint(to_torch(file), VAE), expected)
  assert "first_stage_model.decoder.up.2.upsample.conv.bias" in file


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "conditioner.embedders.1.model."])
def test_open_clip_names_are_those_that_diffusers_converts(oracle, prefix):
  import transformers

  config = transformers.CLIPTextConfig(**{**TEXT, "projection_dim": 12})
  model = transformers.CLIPTextModelWithProjection(config)
  expected = randomize(model)
  file = to_original(expected, original.open_clip, prefix)
  converted = oracle.convert_open_clip_checkpoint(model, to_torch(file), prefix)
  if prefix.startswith("cond"):  # 2.x has the projection, and diffusers leaves it out
    converted["text_projection.weight"] = expected["text_projection.weight"]
  assert_same_tensors(converted, expected)
  assert file[prefix + "transformer.resblocks.1.attn.in_proj_weight"].shape == (36, 12)


def test_the_original_numbering_by_hand():
  found = original.unet(
    {
      *(f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(4) for j in range(2)),
      *(f"up_blocks.{i}.resnets.{j}.conv1.weight" for i in range(4) for j in range(3)),
      *(f"up_blocks.{i}.attentions.{j}.norm.bias" for i in (1, 2, 3) for j in range(3)),
      *("up_blocks.0.upsamplers.0.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
      *("down_blocks.2.downsamplers.0.conv.bias", "mid_block.resnets.1.norm2.bias"),
    }
  )
  # Stable Diffusion 1.5: input_blocks.9.0.op is the last downsampler; only the first level on the
  # way up does not attend.
  assert found["down_blocks.2.downsamplers.0.conv.bias"].name == "input_blocks.9.0.op.bias"
  name = found["down_blocks.1.resnets.1.conv1.weight"].name
  assert name == "input_blocks.5.0.in_layers.2.weight"
  assert found["up_blocks.0.upsamplers.0.conv.bias"].name == "output_blocks.2.1.conv.bias"
  assert found["up_blocks.1.upsamplers.0.conv.bias"].name == "output_blocks.5.2.conv.bias"
  assert found["up_blocks.3.attentions.2.norm.bias"].name == "output_blocks.11.1.norm.bias"
  assert found["mid_block.resnets.1.norm2.bias"].name == "middle_block.2.out_layers.0.bias"
