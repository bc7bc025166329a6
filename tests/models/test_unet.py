"""The UNet against diffusers' own, on random weights, and the errors of its configuration."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.networks import embeddings, unet

# Every config overrides this smallest useful network.
BASE = {
  "sample_size": 16,
  "block_out_channels": [8, 16],
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "cross_attention_dim": 12,
  "attention_head_dim": 2,
  "norm_num_groups": 4,
}
XL_LIKE = {
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
  "layers_per_block": 2,
  "attention_head_dim": [1, 2],
  "transformer_layers_per_block": [1, 2],
  "use_linear_projection": True,
  "addition_embed_type": "text_time",
  "addition_time_embed_dim": 6,
  "projection_class_embeddings_input_dim": 10 + 6 * 6,
}
# name -> (overrides, (height, width))
NETWORKS = {
  "sd1": (
    {
      "block_out_channels": [8, 16, 24],
      "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
      "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
      "attention_head_dim": 4,
    },
    (10, 12),  # 10 -> 5 -> 3 and back
  ),
  "sd2": (
    {
      "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
      "attention_head_dim": [1, 4],
      "use_linear_projection": True,
      "upcast_attention": True,
    },
    (8, 8),
  ),
  "xl": (XL_LIKE, (8, 6)),
  "odd_size_norms_and_time": (
    {
      "norm_num_groups": 2,
      "norm_eps": 1e-2,
      "freq_shift": 1,
      "flip_sin_to_cos": False,
      "mid_block_scale_factor": 1.5,
    },
    (9, 13),
  ),
  "no_attention_first": (
    {
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
      "layers_per_block": [1, 2],
      "in_channels": 9,
      "out_channels": 3,
    },
    (4, 8),
  ),
}


def torch_unet(config):
  """diffusers' network with every parameter random: zero biases and unit scales hide mistakes."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  torch.manual_seed(0)
  model = diffusers.UNet2DConditionModel.from_config(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        offset = 1.0 if name.endswith("weight") else 0.0
        parameter.copy_(offset + 0.3 * torch.randn(parameter.shape))
  return model


def random_inputs(config, size, batch=2):
  rng = np.random.default_rng(1)
  x_t = rng.normal(size=(batch, *size, config.in_channels)).astype(np.float32)
  t = np.array([999, 3], np.int32)[:batch]
  text = rng.normal(size=(batch, 5, config.cross_attention_dim)).astype(np.float32)
  added = None
  if config.addition_embed_type:
    pooled = rng.normal(size=(batch, 10)).astype(np.float32)
    time_ids = rng.integers(0, 1024, size=(batch, 6)).astype(np.float32)
    added = {"text_embeds": pooled, "time_ids": time_ids}
  return x_t, t, text, added


@pytest.mark.parametrize("name", NETWORKS)
def test_matches_diffusers(name):
  torch = pytest.importorskip("torch")
  import torch_trees

  overrides, size = NETWORKS[name]
  source = {**BASE, **overrides}
  model = torch_unet(source)
  # What diffusers would write to config.json, with every field of its signature present.
  config = unet.UNetConfig.from_dict(json.loads(model.to_json_string()))
  params = torch_trees.to_tree(model.state_dict())
  x_t, t, text, added = random_inputs(config, size)
  with torch.no_grad():
    expected = model(
      torch.from_numpy(x_t).permute(0, 3, 1, 2),
      torch.from_numpy(t),
      torch.from_numpy(text),
      added_cond_kwargs=added and {k: torch.from_numpy(v) for k, v in added.items()},
    ).sample.permute(0, 2, 3, 1)

  network = unet.UNet2DConditionModel(config)
  actual = jax.jit(network.apply)(
    {"params": params}, x_t, t, text, added
  )

  assert actual.shape == (2, *size, config.out_channels)
  assert float(expected.std()) > 0.1
  np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4)


def test_timestep_embedding_by_hand():
  # dim 4, no shift: w = 10000^(-0/2), 10000^(-1/2) = 1, 0.01. At t = 2: angles 2, 0.02.
  expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
  t = jnp.array([2])
  plain = embeddings.timestep_embedding(t, 4, flip_sin_to_cos=False, freq_shift=0)
  np.testing.assert_allclose(plain[0], expected, atol=1e-6)
  flipped = embeddings.timestep_embedding(t, 4, flip_sin_to_cos=True, freq_shift=0)
  np.testing.assert_allclose(flipped[0], expected[2:] + expected[:2], atol=1e-6)
  # Shift 1 divides by half - 1 = 1: w = 1, 0.0001.
  shifted = embeddings.timestep_embedding(t, 4, flip_sin_to_cos=False, freq_shift=1)
  np.testing.assert_allclose(shifted[0, 1], np.sin(0.0002), rtol=1e-6)


def test_time_is_embedded_in_float32_under_bfloat16():
  # 998 and 999 are one number in bfloat16.
  t = jnp.array([998, 999])
  embedding = embeddings.timestep_embedding(t, 8, flip_sin_to_cos=True, freq_shift=0)
  assert embedding.dtype == jnp.float32
  one_level = {
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
  }
  config = unet.UNetConfig.from_dict({**BASE, **one_level})
  network = unet.UNet2DConditionModel(config)
  x_t, _, text, _ = random_inputs(config, (4, 4))
  shapes = jax.eval_shape(network.init, jax.random.key(0), x_t, t, text)
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
  x_t = jnp.broadcast_to(x_t[:1], x_t.shape).astype(jnp.bfloat16)
  out = jax.jit(network.apply)(
    params, x_t, t, jnp.broadcast_to(text[:1], text.shape)
  )
  assert out.dtype == jnp.bfloat16
  assert not np.array_equal(out[0], out[1])


def test_config_is_hashable_and_survives_json():
  config = unet.UNetConfig.from_dict({"_class_name": "UNet2DConditionModel", **BASE, **XL_LIKE})
  again = unet.UNetConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
  assert again == config
  assert hash(again) == hash(config)


def test_config_defaults_are_those_of_diffusers():
  """A config.json may leave out fields; what they then mean is what diffusers says."""
  diffusers = pytest.importorskip("diffusers")
  signature = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
  defaults = {k: p.default for k, p in signature.items() if p.default is not p.empty}
  assert unet.UNetConfig.from_dict(defaults) == unet.UNetConfig()
  assert all(
    getattr(unet.UNetConfig(), f.name) == defaults[f.name]
    for f in dataclasses.fields(unet.UNetConfig)
  )


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("center_input_sample", True),
    ("act_fn", "gelu"),
    ("mid_block_type", None),
    ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "ResnetUpsampleBlock2D"]),
    ("only_cross_attention", [True, False]),
    ("class_embed_type", "timestep"),
    ("addition_embed_type", "image"),
    ("resnet_time_scale_shift", "scale_shift"),
    ("time_cond_proj_dim", 256),
    ("num_attention_heads", 8),
    ("downsample_padding", 0),
    ("norm_num_groups", None),
    ("cross_attention_dim", [12, 12]),
    ("transformer_layers_per_block", [[1, 2], 1]),
  ],
)
def test_unsupported_value_names_field_and_value(field, value):
  shown = tuple(value) if isinstance(value, list) else value
  with pytest.raises(ValueError, match=field) as error:
    unet.UNetConfig.from_dict({**BASE, field: value})
  assert str(value) in str(error.value) or str(shown) in str(error.value)
  assert "supported" in str(error.value)
  assert len(str(error.value).splitlines()) <= 3


def test_inconsistent_configs_raise():
  with pytest.raises(ValueError, match="unknown field blok_out_channels"):
    unet.UNetConfig.from_dict({**BASE, "blok_out_channels": [8, 16]})
  with pytest.raises(ValueError, match="one entry of layers_per_block"):
    unet.UNetConfig.from_dict({**BASE, "layers_per_block": [1, 1, 1]})
  with pytest.raises(ValueError, match="multiple of norm_num_groups=3"):
    unet.UNetConfig.from_dict({**BASE, "norm_num_groups": 3})
  # The last level has no attention of its own; the middle block uses its heads.
  with pytest.raises(ValueError, match="attention_head_dim=3"):
    unet.UNetConfig.from_dict({**BASE, "attention_head_dim": [2, 3]})
  with pytest.raises(ValueError, match="needs addition_time_embed_dim"):
    unet.UNetConfig.from_dict({**BASE, "addition_embed_type": "text_time"})


def test_missing_or_misshapen_added_conditioning_raises():
  config = unet.UNetConfig.from_dict({**BASE, **XL_LIKE})
  network = unet.UNet2DConditionModel(config)
  x_t, t, text, added = random_inputs(config, (4, 4))
  with pytest.raises(ValueError, match=r"text_time.* got None"):
    jax.eval_shape(network.init, jax.random.key(0), x_t, t, text)
  with pytest.raises(ValueError, match=r"got \['text'\]"):
    jax.eval_shape(network.init, jax.random.key(0), x_t, t, text, {"text": text})
  short = {**added, "time_ids": added["time_ids"][:, :4]}
  with pytest.raises(ValueError, match="projection_class_embeddings_input_dim=46"):
    jax.eval_shape(network.init, jax.random.key(0), x_t, t, text, short)
