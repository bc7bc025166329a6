"""The MMDiT of SD3 and SD3.5 against diffusers' own, on random weights, and its configs' errors."""

import json

import jax
import numpy as np
import pytest

from jaxalign.models.networks import sd3_transformer

BASE = {
  "sample_size": 16,
  "patch_size": 2,
  "in_channels": 3,
  "num_layers": 3,
  "attention_head_dim": 8,
  "num_attention_heads": 2,
  "joint_attention_dim": 12,
  "caption_projection_dim": 16,
  "pooled_projection_dim": 10,
  "out_channels": 3,
  "pos_embed_max_size": 12,
}
# name -> (overrides, (height, width))
NETWORKS = {
  "medium_3": ({}, (8, 14)),
  "medium_3_5": ({"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]}, (10, 6)),
  "large_3_5": ({"qk_norm": "rms_norm", "pos_embed_max_size": 9, "sample_size": 20}, (18, 2)),
  "other_channels_and_patches": (
    {"patch_size": 4, "out_channels": 5, "num_layers": 1, "attention_head_dim": 4},
    (8, 12),
  ),
}
# Published configs, and their parameters without the table of positions.
PUBLISHED = {
  "stabilityai/stable-diffusion-3-medium": (24, (), None, 192, 2_028_328_000),
  "stabilityai/stable-diffusion-3.5-medium": (24, tuple(range(13)), "rms_norm", 384, None),
  "stabilityai/stable-diffusion-3.5-large": (38, (), "rms_norm", 192, None),
}


def source_config(overrides):
  source = {**BASE, **overrides}
  width = source["attention_head_dim"] * source["num_attention_heads"]
  return {**source, "caption_projection_dim": width}


def make_inputs(config, size):
  rng = np.random.default_rng(1)
  shapes = [(2, *size, config.in_channels), (2, 5, config.joint_attention_dim)]
  x_t, text = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  pooled = rng.normal(size=(2, config.pooled_projection_dim)).astype(np.float32)
  return x_t, np.array([937.3, 12.5], np.float32), text, pooled


@pytest.mark.parametrize("name", NETWORKS)
def test_matches_diffusers(name):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  import torch_trees

  overrides, size = NETWORKS[name]
  source = source_config(overrides)
  model = torch_trees.randomize(diffusers.SD3Transformer2DModel.from_config(source))
  config = sd3_transformer.SD3Config.from_dict(json.loads(model.to_json_string()))
  x_t, t, text, pooled = make_inputs(config, size)
  with torch.no_grad():
    expected = model(
      torch.from_numpy(x_t).permute(0, 3, 1, 2),
      encoder_hidden_states=torch.from_numpy(text),
      pooled_projections=torch.from_numpy(pooled),
      timestep=torch.from_numpy(t),
    ).sample.permute(0, 2, 3, 1)
  params = torch_trees.to_tree(model.state_dict())
  network = sd3_transformer.SD3Transformer2DModel(config)
  actual = jax.jit(network.apply)({"params": params}, x_t, t, text, pooled)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, atol=1e-5 * float(expected.abs().max()))


def test_the_table_of_positions_that_a_new_network_starts_with():
  diffusers = pytest.importorskip("diffusers")
  source = source_config({})
  theirs = diffusers.SD3Transformer2DModel.from_config(source).pos_embed.pos_embed.numpy()
  config = sd3_transformer.SD3Config.from_dict(source)
  network = sd3_transformer.SD3Transformer2DModel(config)
  params = network.init(jax.random.key(0), *make_inputs(config, (4, 4)))["params"]
  np.testing.assert_allclose(params["pos_embed"]["pos_embed"], theirs, atol=1e-6)
