"""Small networks of every kind that has single files, and their tensors' original names."""

import re

import numpy as np

UNETS = {
  "1.x": {
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
  },
  "2.x": {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": [2, 4],
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "sample_size": 8,
  },
  "xl": {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": 20,
    "attention_head_dim": [1, 2, 2],
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
    "sample_size": 8,
  },
}
VAE = {
  "block_out_channels": [4, 8, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 3,
  "up_block_types": ["UpDecoderBlock2D"] * 3,
  "layers_per_block": 2,
  "norm_num_groups": 2,
  "sample_size": 32,
  "scaling_factor": 0.18215,
}
TEXT = {
  "vocab_size": 60,
  "hidden_size": 12,
  "intermediate_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "max_position_embeddings": 8,
  "bos_token_id": 56,
  "eos_token_id": 57,
  "pad_token_id": 57,
  "projection_dim": 6,
}


def to_original(tensors, part, prefix=""):
  """Tensors under diffusers' names as an original file has them."""
  found, thirds = {}, {}
  for name, source in part(tensors.keys()).items():
    array = np.asarray(tensors[name])
    if source.third is not None:
      thirds.setdefault(source.name, {})[source.third] = array
      continue
    if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", source.name):
      array = array[:, :, None, None]
    assert source.name not in found
    found[source.name] = array.T if source.transposed else array
  found |= {name: np.concatenate([of[i] for i in range(3)]) for name, of in thirds.items()}
  return {prefix + name: np.ascontiguousarray(array) for name, array in found.items()}
