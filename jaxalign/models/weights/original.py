"""The names of the original single-file checkpoints, for those of diffusers.

CompVis and Stability published UNet and autoencoder with blocks numbered through, and from 2.x on a
text encoder with open_clip's names. Each function maps every name that diffusers has of the tensors
of a component to the tensor of the original that holds it:

  down_blocks.1.resnets.0.conv1.weight                  input_blocks.4.0.in_layers.2.weight
  decoder.up_blocks.0.upsamplers.0.conv.bias            decoder.up.3.upsample.conv.bias
  text_model.encoder.layers.2.self_attn.k_proj.weight   transformer.resblocks.2.attn.in_proj_weight

The numbering follows from the names: how many residual blocks a level has, and whether it attends.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from jaxalign.models.weights import lazy


class Original(NamedTuple):
  """Where a tensor is in an original checkpoint.

  name: of the tensor there, without the prefix of its component.
  third: 0, 1 or 2 if it is that third of its rows: queries, keys and values are one matrix.
  transposed: whether it is stored as `[in, out]`.
  """

  name: str
  third: int | None = None
  transposed: bool = False

  def view(self, stored: lazy.LazyArray) -> lazy.LazyArray:
    """The tensor as diffusers has it, of the one that is `stored` under `name`."""
    if self.third is not None:
      rows = stored.shape[0] // 3
      stored = stored.rows(self.third * rows, (self.third + 1) * rows)
    return stored.transpose((1, 0)) if self.transposed else stored


Names = Callable[[Collection[str]], dict[str, Original]]


def renamed(
  sources: Mapping[str, Original],
  stored: Mapping[str, lazy.LazyArray],
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, lazy.LazyArray]:
  """Those of our tensors that are stored, by our names; `stored` has the names of `sources`.

  A matrix may be stored as a 1 x 1 convolution; `shapes` are ours.
  """
  return {
    name: _like(source.view(stored[source.name]), shapes[name])
    for name, source in sources.items()
    if source.name in stored
  }


def _like(array: lazy.LazyArray, shape: tuple[int, ...]) -> lazy.LazyArray:
  is_window = array.ndim > 2 and set(array.shape[2:]) == {1}
  return array.reshape_units(array.shape[:2]) if is_window and len(shape) == 2 else array


_UNET_ENDS = {
  "conv_in": "input_blocks.0.0",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "add_embedding.linear_1": "label_emb.0.0",
  "add_embedding.linear_2": "label_emb.0.2",
}
_UNET_RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(
  r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet(expected: Collection[str]) -> dict[str, Original]:
  """Of a UNet."""
  resnets = {
    side: _count(expected, rf"{side}_blocks\.(\d+)\.resnets\.\d+\.conv1\.weight")
    for side in ("down", "up")
  }
  attends = {match[1] for name in expected if (match := re.match(r"up_blocks\.(\d+)\.att", name))}

  def original(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
      return f"{_UNET_ENDS[module]}.{leaf}"
    block = _UNET_BLOCK.fullmatch(module)
    if not block:
      return name
    side, level, kind, number, rest = block[1], block[2], block[3], int(block[4]), block[5]
    if kind == "resnets":
      rest = _UNET_RESNET.get(rest, rest)
    if side == "mid":
      place = f"middle_block.{2 * number if kind == 'resnets' else 1}"
      return f"{place}.{rest}.{leaf}"
    # Before a level on the way down come conv_in and, for each level, its blocks and a downsampler.
    before = sum(resnets[side][: int(level)])
    first = before + 1 + int(level) if side == "down" else before
    if kind == "downsamplers":
      return f"input_blocks.{first + resnets['down'][int(level)]}.0.op.{leaf}"
    if kind == "upsamplers":
      last = first + resnets["up"][int(level)] - 1
      return f"output_blocks.{last}.{2 if level in attends else 1}.conv.{leaf}"
    blocks = "input_blocks" if side == "down" else "output_blocks"
    return f"{blocks}.{first + number}.{0 if kind == 'resnets' else 1}.{rest}.{leaf}"

  return {name: Original(original(name)) for name in expected}


def _count(expected: Collection[str], pattern: str) -> list[int]:
  """How many names of each level match; the level is the pattern's group."""
  levels = [int(match[1]) for name in expected if (match := re.fullmatch(pattern, name))]
  return [levels.count(level) for level in range(max(levels, default=-1) + 1)]


_VAE_RULES = (
  (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
  (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
  (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
  (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
  (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
  (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
  (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
  (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
  (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
  (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
  (r"\.conv_shortcut\.", ".nin_shortcut."),
  (r"\.conv_norm_out\.", ".norm_out."),
)


def vae(expected: Collection[str]) -> dict[str, Original]:
  """Of an autoencoder, whose original counts the decoder's levels from the other end."""
  levels = len(_count(expected, r"decoder\.up_blocks\.(\d+)\.resnets\.0\.conv1\.weight"))

  def original(name: str) -> str:
    name = re.sub(r"(\.up_blocks\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)
    for pattern, replacement in _VAE_RULES:
      name = re.sub(pattern, replacement, name)
    return name

  return {name: Original(original(name)) for name in expected}


_OPEN_CLIP_ENDS = {
  "text_model.embeddings.token_embedding.weight": Original("token_embedding.weight"),
  "text_model.embeddings.position_embedding.weight": Original("positional_embedding"),
  "text_model.final_layer_norm.weight": Original("ln_final.weight"),
  "text_model.final_layer_norm.bias": Original("ln_final.bias"),
  "text_projection.weight": Original("text_projection", transposed=True),
}
_OPEN_CLIP_LAYER = {
  "layer_norm1": "ln_1",
  "layer_norm2": "ln_2",
  "mlp.fc1": "mlp.c_fc",
  "mlp.fc2": "mlp.c_proj",
  "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_BLOCK = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def open_clip(expected: Collection[str]) -> dict[str, Original]:
  """Of a text encoder."""

  def original(name: str) -> Original:
    block = _OPEN_CLIP_BLOCK.fullmatch(name)
    if not block:
      return _OPEN_CLIP_ENDS.get(name, Original(name))
    layer, module, leaf = block.groups()
    start = f"transformer.resblocks.{layer}"
    if module in _OPEN_CLIP_LAYER:
      return Original(f"{start}.{_OPEN_CLIP_LAYER[module]}.{leaf}")
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(module)
    return Original(f"{start}.attn.in_proj_{leaf}", third=third)

  return {name: original(name) for name in expected}


def clip(expected: Collection[str]) -> dict[str, Original]:
  """Of OpenAI's text encoder, whose names are those of transformers."""
  return {name: Original(name) for name in expected}
