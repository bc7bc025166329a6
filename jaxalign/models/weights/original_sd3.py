"""Original names of Stable Diffusion 3 and 3.5: the transformer's, and the config that they tell.

Esser et al. 2024, arXiv:2403.03206. The autoencoder of such a file has the names of `original.vae`,
and its text encoders those of transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxalign.models.weights import original_flow
from jaxalign.models.weights.original_flow import Modules, Shapes, Source

_ENDS: Modules = {
  "x_embedder.proj": ("pos_embed.proj",),
  "context_embedder": ("context_embedder",),
  "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
  "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
  "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
  "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
  **original_flow.FINAL,
}
_BLOCK: Modules = {
  "x_block.adaLN_modulation.1": ("norm1.linear",),
  **original_flow.qkv("x_block.attn.qkv", "attn"),
  "x_block.attn.ln_q": ("attn.norm_q",),
  "x_block.attn.ln_k": ("attn.norm_k",),
  "x_block.attn.proj": ("attn.to_out.0",),
  **original_flow.qkv("x_block.attn2.qkv", "attn2"),
  "x_block.attn2.ln_q": ("attn2.norm_q",),
  "x_block.attn2.ln_k": ("attn2.norm_k",),
  "x_block.attn2.proj": ("attn2.to_out.0",),
  "x_block.mlp.fc1": ("ff.net.0.proj",),
  "x_block.mlp.fc2": ("ff.net.2",),
  "context_block.adaLN_modulation.1": ("norm1_context.linear",),
  **original_flow.qkv("context_block.attn.qkv", "attn", original_flow.ADDED),
  "context_block.attn.ln_q": ("attn.norm_added_q",),
  "context_block.attn.ln_k": ("attn.norm_added_k",),
  "context_block.attn.proj": ("attn.to_add_out",),
  "context_block.mlp.fc1": ("ff_context.net.0.proj",),
  "context_block.mlp.fc2": ("ff_context.net.2",),
}
_TABLE = "pos_embed.pos_embed"
_HEAD = 64  # channels of a head, of which nothing tells where queries are not normalised
_SAMPLE_SIZE = 128  # latent pixels along each side: of all published models, and in no tensor


def sd3(expected: Shapes) -> dict[str, Source]:
  """Of the transformer."""
  # The text ends in the last block, before whose attention it has a norm as the output has.
  last = original_flow.count(expected, "transformer_blocks") - 1
  swapped = (original_flow.NORM_OUT, f"transformer_blocks.{last}.norm1_context.linear")
  lists = {"": ("", _ENDS), "transformer_blocks": ("joint_blocks", _BLOCK)}
  return {**original_flow.sources(expected, lists, swapped), _TABLE: Source("pos_embed")}


def sd3_config(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """`transformer/config.json` by the shapes of a file's tensors, with their prefix or without.

  Raises ValueError, in one line, for the tensors of anything else.
  """
  stored = original_flow.Stored("a Stable Diffusion 3", original_flow.of_transformer(tensors))
  width, channels, patch, _ = stored.shape("x_embedder.proj.weight", 4)
  _, positions, _ = stored.shape("pos_embed", 3)
  if math.isqrt(positions) ** 2 != positions:
    raise stored.error(f"{positions} positions, which is no square")
  norm = "joint_blocks.0.x_block.attn.ln_q.weight"
  (head,) = stored.shape(norm, 1) if norm in stored.tensors else (_HEAD,)
  written, _ = stored.shape("final_layer.linear.weight", 2)
  if width % head or written % patch**2:
    raise stored.error(
      f"{width} channels in heads of {head}, and {written} outputs for patches of {patch} x {patch}"
    )
  layers = stored.blocks("joint_blocks")
  inner, text = stored.shape("context_embedder.weight", 2)
  return {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": _SAMPLE_SIZE,
    "patch_size": patch,
    "in_channels": channels,
    "num_layers": layers,
    "attention_head_dim": head,
    "num_attention_heads": width // head,
    "joint_attention_dim": text,
    "caption_projection_dim": inner,
    "pooled_projection_dim": stored.shape("y_embedder.mlp.0.weight", 2)[1],
    "out_channels": written // patch**2,
    "pos_embed_max_size": math.isqrt(positions),
    "dual_attention_layers": [
      k for k in range(layers) if f"joint_blocks.{k}.x_block.attn2.qkv.weight" in stored.tensors
    ],
    "qk_norm": "rms_norm" if norm in stored.tensors else None,
  }
