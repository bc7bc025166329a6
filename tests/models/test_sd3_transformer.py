"""The MMDiT of SD3 and SD3.5 against diffusers' own, on random weights, and its configs' errors."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.families import initialization
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
# Layers and heads, dual layers, qk_norm and positions of published configs, and the parameters in
# billions, without the table of positions.
PUBLISHED = {
  "3 medium": (24, (), None, 192, 2.03),
  "3.5 medium": (24, tuple(range(13)), "rms_norm", 384, 2.24),
  "3.5 large": (38, (), "rms_norm", 192, 8.06),
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
  network = sd3_transformer.PatchEmbed(config)
  params = network.init(jax.random.key(0), make_inputs(config, (4, 4))[0])["params"]
  np.testing.assert_allclose(params["pos_embed"], theirs, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_tensors_of_diffusers(name):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  import torch_trees

  layers, dual, qk_norm, positions, billions = PUBLISHED[name]
  source = {
    "num_layers": layers,
    "num_attention_heads": layers,
    "caption_projection_dim": 64 * layers,
    "dual_attention_layers": dual,
    "qk_norm": qk_norm,
    "pos_embed_max_size": positions,
  }
  with torch.device("meta"):
    oracle = diffusers.SD3Transformer2DModel.from_config(source)
  zero = torch.zeros(())
  state = {key: zero.expand(tensor.shape) for key, tensor in oracle.state_dict().items()}
  expected = jax.tree.map(np.shape, torch_trees.to_tree(state))
  config = sd3_transformer.SD3Config.from_dict(dict(oracle.config))
  network = sd3_transformer.SD3Transformer2DModel(config)
  inputs = make_inputs(config, (4, 4))
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))["params"]
  assert jax.tree.map(jnp.shape, shapes) == expected
  table = shapes["pos_embed"]["pos_embed"].size  # a constant, and no parameter in PyTorch
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - table
  assert count == sum(tensor.numel() for tensor in oracle.parameters())
  assert round(count / 1e9, 2) == billions


def test_bfloat16_is_near_float32_and_blocks_may_be_computed_again():
  source = source_config({"num_layers": 2, "dual_attention_layers": [0]})
  config = sd3_transformer.SD3Config.from_dict(source)
  network = sd3_transformer.SD3Transformer2DModel(config)
  x_t, t, text, pooled = make_inputs(config, (4, 6))
  shapes = jax.eval_shape(network.init, jax.random.key(0), x_t, t, text, pooled)["params"]
  params = initialization.random_params(jax.random.key(0), shapes)
  full = jax.jit(network.apply)({"params": params}, x_t, t, text, pooled)
  half = jax.jit(network.apply)({"params": params}, x_t.astype(jnp.bfloat16), t, text, pooled)
  assert half.dtype == jnp.bfloat16 and full.dtype == jnp.float32
  np.testing.assert_allclose(half.astype(np.float32), full, atol=0.05 * np.abs(full).max())

  def loss(params, remat):
    again = network.clone(remat=remat)
    return jnp.sum(jnp.square(again.apply({"params": params}, x_t, t, text, pooled)))

  expected = jax.jit(jax.grad(loss), static_argnums=1)(params, "none")
  assert not np.any(expected["pos_embed"]["pos_embed"])  # positions are constants
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max())),
    jax.jit(jax.grad(loss), static_argnums=1)(params, "full"),
    expected,
  )


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"num_layers": 600}, "num_layers: expected at least 1 and below 512, got 600"),
    ({"patch_size": 0}, "patch_size: expected at least 1"),
    ({"caption_projection_dim": 20}, "caption_projection_dim to be 16.*found 20"),
    (
      {"attention_head_dim": 3, "num_attention_heads": 3, "caption_projection_dim": 9},
      "multiple of 4.*found 9",
    ),
    ({"qk_norm": "layer_norm"}, "qk_norm: expected null or rms_norm, found 'layer_norm'"),
    ({"dual_attention_layers": [0, 3]}, "dual_attention_layers: expected layers below 3.*found 3"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=f"transformer config: .*{words}"):
    sd3_transformer.SD3Config.from_dict({**BASE, **change})


def test_sizes_that_patches_do_not_divide_or_positions_do_not_reach():
  config = sd3_transformer.SD3Config.from_dict(source_config({}))
  network = sd3_transformer.SD3Transformer2DModel(config)
  for size in ((5, 4), (4, 26)):
    with pytest.raises(ValueError, match=f"up to 24, got {size[0]} x {size[1]}"):
      jax.eval_shape(network.init, jax.random.key(0), *make_inputs(config, size))


def test_fields_and_defaults_are_those_of_diffusers():
  diffusers = pytest.importorskip("diffusers")
  theirs = inspect.signature(diffusers.SD3Transformer2DModel.__init__).parameters
  defaults = {name: p.default for name, p in theirs.items() if name != "self"}
  ours = {f.name: f.default for f in dataclasses.fields(sd3_transformer.SD3Config)}
  assert ours == defaults
