"""The shapes of networks small enough to read hundreds of adapter files for."""

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxalign.models.adapters import lora
from jaxalign.models.networks import clip, unet
from jaxalign.models.weights import lora_names

UNET = {
  "block_out_channels": [8, 16],
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "layers_per_block": 1,
  "cross_attention_dim": 12,
  "attention_head_dim": 2,
  "norm_num_groups": 4,
}
TEXT = {
  "vocab_size": 20,
  "hidden_size": 12,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "max_position_embeddings": 8,
}
# As in XL the names of the second are those of the first, and its widths are not.
TEXT_2 = {**TEXT, "hidden_size": 10, "intermediate_size": 14, "projection_dim": 6}


def make():
  """`{"unet", "text_encoder", "text_encoder_2"}`: trees of shapes."""
  key, tokens = jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
  network = unet.UNet2DConditionModel(unet.UNetConfig.from_dict(UNET))
  inputs = (jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 8, 12)))
  found = {"unet": jax.eval_shape(network.init, key, *inputs)["params"]}
  for name, config, module in (
    ("text_encoder", TEXT, clip.CLIPTextModel),
    ("text_encoder_2", TEXT_2, clip.CLIPTextModelWithProjection),
  ):
    init = module(clip.CLIPTextConfig.from_dict(config)).init
    found[name] = jax.eval_shape(init, key, tokens)["params"]
  return found


def layers(tree):
  """`{PyTorch name: shape on disk}` of the layers that can have adapters."""
  found = {}
  for path, layer in lora.adaptable_layers(tree):
    *window, inputs, outputs = layer["kernel"].shape
    found[lora_names.module_name(path)] = (outputs, inputs, *window)
  return found


def pair(shape, rank=2, seed=0):
  """Random matrices (A, B) as a file has them, of a layer whose kernel is `shape` on disk."""
  rng = np.random.default_rng(seed)
  outputs, *inputs = shape
  units = (1,) * (len(inputs) - 1)
  a = rng.standard_normal((rank, *inputs), np.float32)
  return a, rng.standard_normal((outputs, rank, *units), np.float32)


def store(path, tensors, metadata=None):
  """Writes tensors as they are, and returns the path."""
  tensors = {name: np.asarray(value) for name, value in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata=metadata)
  return path
