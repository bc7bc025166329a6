"""The published networks at full size: every tensor's name and shape, without allocating any.

The oracles live on PyTorch's meta device. The configs are the fields of the published config.json
files, those that are null or a default of diffusers included where they were written.
"""

import diffusers
import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from jaxalign.models.networks import clip, unet, vae
from jaxalign.models.weights import names

# runwayml/stable-diffusion-v1-5 and CompVis/stable-diffusion-v1-4.
SD1 = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False,
  "cross_attention_dim": 768,
  "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
# stabilityai/stable-diffusion-2-1; 2, 2-base and 2-1-base differ in what has no weights.
SD2 = {
  **SD1,
  "attention_head_dim": [5, 10, 20, 20],
  "cross_attention_dim": 1024,
  "dual_cross_attention": False,
  "num_class_embeds": None,
  "only_cross_attention": False,
  "sample_size": 96,
  "upcast_attention": True,
  "use_linear_projection": True,
}
# timbrooks/instruct-pix2pix.
PIX2PIX = {
  **SD1,
  "in_channels": 8,
  "class_embed_type": None,
  "dual_cross_attention": False,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_class_embeds": None,
  "only_cross_attention": False,
  "resnet_time_scale_shift": "default",
  "upcast_attention": False,
  "use_linear_projection": False,
}
# stabilityai/stable-diffusion-xl-base-1.0.
XL = {
  **SD1,
  "addition_embed_type": "text_time",
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280],
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_dim": 2048,
  "cross_attention_norm": None,
  "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
  "dual_cross_attention": False,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "mid_block_only_cross_attention": None,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_attention_heads": None,
  "num_class_embeds": None,
  "only_cross_attention": False,
  "projection_class_embeddings_input_dim": 2816,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "sample_size": 128,
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
  "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
  "upcast_attention": None,
  "use_linear_projection": True,
}
# stabilityai/stable-diffusion-xl-refiner-1.0.
REFINER = {
  **XL,
  "attention_head_dim": [6, 12, 24, 24],
  "block_out_channels": [384, 768, 1536, 1536],
  "cross_attention_dim": 1280,
  "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
  "projection_class_embeddings_input_dim": 2560,
  "transformer_layers_per_block": 4,
  "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}
UNETS = {
  "sd1": (SD1, 859_520_964),
  "sd2": (SD2, 865_910_724),
  "pix2pix": (PIX2PIX, 859_520_964 + 4 * 9 * 320),
  "xl": (XL, 2_567_463_684),
  "refiner": (REFINER, None),
}

VAE = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "force_upcast": True,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 1024,
  "scaling_factor": 0.13025,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}

CLIP_L = {
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "dropout": 0.0,
  "eos_token_id": 2,
  "hidden_act": "quick_gelu",
  "hidden_size": 768,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 77,
  "model_type": "clip_text_model",
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "pad_token_id": 1,
  "projection_dim": 768,
  "vocab_size": 49408,
}
OPEN_CLIP_H = {  # of Stable Diffusion 2.x, whose last layer was cut off
  **CLIP_L,
  "hidden_act": "gelu",
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_attention_heads": 16,
  "num_hidden_layers": 23,
  "projection_dim": 512,
}
OPEN_CLIP_BIG_G = {  # the second of XL
  **CLIP_L,
  "hidden_act": "gelu",
  "hidden_size": 1280,
  "intermediate_size": 5120,
  "num_attention_heads": 20,
  "num_hidden_layers": 32,
  "projection_dim": 1280,
}
TEXT_ENCODERS = {
  "clip_l": ("CLIPTextModel", CLIP_L, 123_060_480),
  "open_clip_h": ("CLIPTextModel", OPEN_CLIP_H, 340_387_840),
  "open_clip_big_g": ("CLIPTextModelWithProjection", OPEN_CLIP_BIG_G, 694_659_840),
}


def assert_same_tensors(created, oracle, count):
  """Every parameter has the name and the shape that it has in PyTorch, and there are `count`."""
  leaves = jax.tree_util.tree_leaves_with_path(created["params"])
  paths = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
  ours = {names.torch_name(path): names.torch_shape(path, shape) for path, shape in paths.items()}
  found = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
  theirs = {names.canonical_name(name, ours): shape for name, shape in found.items()}
  theirs.pop(None, None)  # buffers
  assert ours == theirs
  assert count in (None, sum(leaf.size for _, leaf in leaves))


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
  source, count = UNETS[name]
  config = unet.UNetConfig.from_dict(source)
  with torch.device("meta"):
    oracle = diffusers.UNet2DConditionModel.from_config(source)
  numbers = 5 if name == "refiner" else 6  # an aesthetic score instead of the target size
  added = {"text_embeds": jnp.zeros((1, 1280)), "time_ids": jnp.zeros((1, numbers))}
  x_t = jnp.zeros((1, 8, 8, config.in_channels))
  text = jnp.zeros((1, 2, config.cross_attention_dim))
  network = unet.UNet2DConditionModel(config)
  created = jax.eval_shape(network.init, jax.random.key(0), x_t, jnp.zeros(1), text, added)
  assert_same_tensors(created, oracle, count)


def test_autoencoder():
  with torch.device("meta"):
    oracle = diffusers.AutoencoderKL.from_config(VAE)
  network = vae.AutoencoderKL(vae.VAEConfig.from_dict(VAE))
  created = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  assert_same_tensors(created, oracle, 83_653_863)


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder(name):
  class_name, source, count = TEXT_ENCODERS[name]
  with torch.device("meta"):
    oracle = getattr(transformers, class_name)(transformers.CLIPTextConfig(**source))
  network = getattr(clip, class_name)(clip.CLIPTextConfig.from_dict(source))
  created = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
  assert_same_tensors(created, oracle, count)
