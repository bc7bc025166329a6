"""Original names of FLUX.1 and FLUX.2: the transformers', and the configs that they tell.

Labs et al. 2025, arXiv:2506.15742. A file holds the transformer alone, or that of FLUX.1 with it an
autoencoder under the names of `original.vae`.
"""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.weights import original_flow
from jaxalign.models.weights.original_flow import Modules, Shapes, Source


def _mlp(theirs: str, ours: str) -> Modules:
  return {f"{theirs}.in_layer": (f"{ours}.linear_1",), f"{theirs}.out_layer": (f"{ours}.linear_2",)}


_ENDS: Modules = {
  "img_in": ("x_embedder",),
  "txt_in": ("context_embedder",),
  **original_flow.FINAL,
}
_ENDS_1: Modules = {
  **_ENDS,
  **_mlp("time_in", "time_text_embed.timestep_embedder"),
  **_mlp("guidance_in", "time_text_embed.guidance_embedder"),
  **_mlp("vector_in", "time_text_embed.text_embedder"),
}
_ENDS_2: Modules = {
  **_ENDS,
  **_mlp("time_in", "time_guidance_embed.timestep_embedder"),
  **_mlp("guidance_in", "time_guidance_embed.guidance_embedder"),
  "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
  "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
  "single_stream_modulation.lin": ("single_stream_modulation.linear",),
}
_DOUBLE: Modules = {
  **original_flow.qkv("img_attn.qkv", "attn"),
  "img_attn.norm.query_norm": ("attn.norm_q",),
  "img_attn.norm.key_norm": ("attn.norm_k",),
  "img_attn.proj": ("attn.to_out.0",),
  **original_flow.qkv("txt_attn.qkv", "attn", original_flow.ADDED),
  "txt_attn.norm.query_norm": ("attn.norm_added_q",),
  "txt_attn.norm.key_norm": ("attn.norm_added_k",),
  "txt_attn.proj": ("attn.to_add_out",),
}
_DOUBLE_1: Modules = {
  **_DOUBLE,
  "img_mod.lin": ("norm1.linear",),
  "txt_mod.lin": ("norm1_context.linear",),
  "img_mlp.0": ("ff.net.0.proj",),
  "img_mlp.2": ("ff.net.2",),
  "txt_mlp.0": ("ff_context.net.0.proj",),
  "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_2: Modules = {
  **_DOUBLE,
  "img_mlp.0": ("ff.linear_in",),
  "img_mlp.2": ("ff.linear_out",),
  "txt_mlp.0": ("ff_context.linear_in",),
  "txt_mlp.2": ("ff_context.linear_out",),
}
_SINGLE: Modules = {
  "norm.query_norm": ("attn.norm_q",),
  "norm.key_norm": ("attn.norm_k",),
}
_SINGLE_1: Modules = {
  **_SINGLE,
  "modulation.lin": ("norm.linear",),
  "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
  "linear2": ("proj_out",),
}
_SINGLE_2: Modules = {
  **_SINGLE,
  "linear1": ("attn.to_qkv_mlp_proj",),
  "linear2": ("attn.to_out",),
}
_HEAD = 128  # channels of a head, by which alone their parts for each axis of positions are known


def flux1(expected: Shapes) -> dict[str, Source]:
  """Of the transformer of FLUX.1."""
  return _names(expected, _ENDS_1, _DOUBLE_1, _SINGLE_1)


def flux2(expected: Shapes) -> dict[str, Source]:
  """Of the transformer of FLUX.2."""
  return _names(expected, _ENDS_2, _DOUBLE_2, _SINGLE_2)


def _names(
  expected: Shapes, ends: Modules, double: Modules, single: Modules
) -> dict[str, Source]:
  lists = {
    "": ("", ends),
    "transformer_blocks": ("double_blocks", double),
    "single_transformer_blocks": ("single_blocks", single),
  }
  return original_flow.sources(expected, lists, [original_flow.NORM_OUT])


def flux1_config(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """FLUX.1's `transformer/config.json` by the shapes of a file's tensors, prefixed or not.

  Raises ValueError, in one line, for the tensors of anything else.
  """
  stored = original_flow.Stored("a FLUX.1", original_flow.of_transformer(tensors))
  pooled = stored.shape("vector_in.in_layer.weight", 2)[1]  # which FLUX.2 and Chroma have not
  return {
    "_class_name": "FluxTransformer2DModel",
    **_shared(stored),
    "pooled_projection_dim": pooled,
    "axes_dims_rope": [16, 56, 56],
  }


def flux2_config(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """FLUX.2's `transformer/config.json` by the shapes of a file's tensors, prefixed or not.

  Raises ValueError, in one line, for the tensors of anything else.
  """
  stored = original_flow.Stored("a FLUX.2", original_flow.of_transformer(tensors))
  stored.shape("single_stream_modulation.lin.weight", 2)
  width, hidden = stored.shape("double_blocks.0.img_mlp.2.weight", 2)
  return {
    "_class_name": "Flux2Transformer2DModel",
    **_shared(stored),
    "timestep_guidance_channels": stored.shape("time_in.in_layer.weight", 2)[1],
    "mlp_ratio": hidden / width,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-6,
  }


def _shared(stored: original_flow.Stored) -> dict[str, Any]:
  """The fields that both have."""
  width, channels = stored.shape("img_in.weight", 2)
  written, _ = stored.shape("final_layer.linear.weight", 2)
  (head,) = stored.shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
  if head != _HEAD or width % head:
    raise stored.error(f"{width} channels in heads of {head}, not of {_HEAD}")
  return {
    "patch_size": 1,
    "in_channels": channels,
    "out_channels": None if written == channels else written,
    "num_layers": stored.blocks("double_blocks"),
    "num_single_layers": stored.blocks("single_blocks"),
    "attention_head_dim": head,
    "num_attention_heads": width // head,
    "joint_attention_dim": stored.shape("txt_in.weight", 2)[1],
    "guidance_embeds": "guidance_in.in_layer.weight" in stored.tensors,
  }
