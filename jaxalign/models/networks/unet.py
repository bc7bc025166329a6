"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL, driven by its config.json.

Sources: Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952 (text_time).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.networks import embeddings, layers, unet_blocks
from jaxalign.types import Array

_DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Fields of a config.json that describe variants this network does not have, with the values that
# describe the network it is.
FIXED = {
  "act_fn": ("silu", "swish"),
  "addition_embed_type_num_heads": (64,),
  "attention_type": ("default",),
  "center_input_sample": (False,),
  "class_embed_type": (None,),
  "class_embeddings_concat": (False,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "cross_attention_norm": (None,),
  "downsample_padding": (1,),
  "dropout": (0.0,),
  "dual_cross_attention": (False,),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "mid_block_only_cross_attention": (None, False),
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "num_attention_heads": (None,),
  "num_class_embeds": (None,),
  "only_cross_attention": (False,),
  "resnet_out_scale_factor": (1.0,),
  "resnet_skip_time_act": (False,),
  "resnet_time_scale_shift": ("default",),
  "reverse_transformer_layers_per_block": (None,),
  "time_cond_proj_dim": (None,),
  "time_embedding_act_fn": (None,),
  "time_embedding_dim": (None,),
  "time_embedding_type": ("positional",),
  "timestep_post_act": (None,),
  "use_gated_attention": (False,),  # attention_type, in the first folders of GLIGEN
  # Logits and softmax are float32 here always, so all values describe the same computation.
  "upcast_attention": (False, True, None),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The fields of a UNet's config.json that choose something here, with their published defaults.

  Attributes:
    sample_size: height and width of the latents it was trained on; the network takes any.
    attention_head_dim: the NUMBER of heads, per level or for all; misnamed in the format.
    layers_per_block, transformer_layers_per_block: per level or for all.
    cross_attention_dim: width of the text embedding.
    addition_embed_type: "text_time" adds the pooled text and six numbers (XL) to the time
      embedding; `projection_class_embeddings_input_dim` is their joint width.
  """

  sample_size: int | tuple[int, ...] | None = None
  in_channels: int = 4
  out_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int | tuple[int, ...] = 2
  mid_block_scale_factor: float = 1.0
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int = 1280
  attention_head_dim: int | tuple[int, ...] = 8
  transformer_layers_per_block: int | tuple[int, ...] = 1
  use_linear_projection: bool = False
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
    """Reads a config.json; raises ValueError for a field that asks for something else."""
    own = {field.name for field in dataclasses.fields(cls)}
    kwargs: dict[str, Any] = {}
    for name, value in config.items():
      if name.startswith("_"):
        continue
      if name in own:
        kwargs[name] = tuple(value) if isinstance(value, list) else value
      elif name in FIXED:
        _check_value(name, value, FIXED[name])
      else:
        raise ValueError(
          f"unet config: unknown field {checks.cut(name, 60)}={checks.shown(value)}"
          f"{checks.closest(name, own)}"
        )
    return cls(**kwargs)

  def __post_init__(self):
    for name, supported in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
      _check_value(name, getattr(self, name), supported)
    _check_value("addition_embed_type", self.addition_embed_type, (None, "text_time"))
    self._check_text_time()
    self._check_integers()
    self._check_divisibility()

  def _check_text_time(self):
    if self.addition_embed_type is None:
      return
    for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
      if getattr(self, name) is None:
        raise ValueError(f"unet config: addition_embed_type='text_time' needs {name}, got None")

  def _check_integers(self):
    integers = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")
    sizes = ("norm_num_groups", "cross_attention_dim", "in_channels", "out_channels")
    for name in (*integers, *sizes, "block_out_channels"):
      value = getattr(self, name)
      values = value if name not in sizes and isinstance(value, tuple) else (value,)
      most = layers.MOST if "layers" in name else checks.MOST
      if not all(isinstance(v, int) and 0 < v < most for v in values):
        kind = "positive integer, or one per level" if name in integers else "positive integer"
        raise ValueError(
          f"unet config: {name}={checks.shown(value)} is not supported; supported: {kind}"
        )
    for name in (*integers, "down_block_types", "up_block_types"):
      value = getattr(self, name)
      if not isinstance(value, int) and len(value) != len(self.block_out_channels):
        raise ValueError(
          f"unet config: expected one entry of {name} for each of block_out_channels "
          f"{checks.shown(self.block_out_channels)}, got {checks.shown(value)}"
        )

  def _check_divisibility(self):
    levels = self.levels()
    for level, up_block_type in zip(levels, self.up_block_types[::-1], strict=True):
      attends = (
        level.has_attention
        or up_block_type.startswith("CrossAttn")
        or level is levels[-1]  # the middle block has its width and heads
      )
      heads = level.num_heads if attends else 1
      if level.channels % self.norm_num_groups or level.channels % heads:
        raise ValueError(
          f"unet config: block_out_channels={level.channels} must be a multiple of norm_num_groups="
          f"{self.norm_num_groups} and of the number of heads, attention_head_dim={heads}"
        )

  def per_level(self, name: str) -> tuple[int, ...]:
    """The field `name` with one entry for each level, highest resolution first."""
    value = getattr(self, name)
    return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

  def levels(self) -> list[unet_blocks.Level]:
    """What each resolution is made of on the way down, highest resolution first."""
    return [
      unet_blocks.Level(
        channels=channels,
        num_resnets=num_resnets,
        has_attention=block_type.startswith("CrossAttn"),
        num_transformer_layers=num_transformer_layers,
        num_heads=num_heads,
        norm_num_groups=self.norm_num_groups,
        norm_eps=self.norm_eps,
        use_linear_projection=self.use_linear_projection,
      )
      for channels, block_type, num_resnets, num_transformer_layers, num_heads in zip(
        self.block_out_channels,
        self.down_block_types,
        self.per_level("layers_per_block"),
        self.per_level("transformer_layers_per_block"),
        self.per_level("attention_head_dim"),
        strict=True,
      )
    ]


def _check_value(name: str, value: Any, supported: tuple) -> None:
  """Raises unless `value`, or each entry of it, is supported."""
  values = value if isinstance(value, list | tuple) else (value,)
  if not all(v in supported for v in values):
    allowed = " or ".join(repr(v) for v in supported)
    raise ValueError(
      f"unet config: {name}={checks.shown(value, 200)} is not supported; supported: {allowed}"
    )


class UNet2DConditionModel(nn.Module):
  """Predicts noise, velocity or x_0 (whatever it was trained for) from `x_t`, time and text.

  It computes in the dtype of `x_t`; norms, attention logits and the sinusoids are float32. `remat`
  says what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  config: UNetConfig
  remat: str = "none"

  @nn.compact
  def __call__(
    self, x_t: Array, t: Array, text: Array, added: Mapping[str, Array] | None = None
  ) -> Array:
    """Runs the network.

    Args:
      x_t: `[B, H, W, in_channels]`; any H and W.
      t: `[B]`, integer or float timesteps.
      text: `[B, N, cross_attention_dim]`, the text encoder's last hidden states.
      added: for "text_time" (XL), `text_embeds [B, P]` (pooled text) and `time_ids [B, 6]`
        (original height and width, crop top and left, target height and width, in pixels).

    Returns:
      `[B, H, W, out_channels]`, the dtype of `x_t`.
    """
    config = self.config
    text = text.astype(x_t.dtype)
    temb = self._time_embedding(t, added, x_t.dtype)
    levels = [dataclasses.replace(level, remat=self.remat) for level in config.levels()]
    last = len(levels) - 1

    x = layers.Conv(config.block_out_channels[0], name="conv_in")(x_t)
    skips = [x]
    for i, level in enumerate(levels):
      x, maps = unet_blocks.DownBlock(level, i < last, name=f"down_blocks_{i}")(x, temb, text)
      skips.extend(maps)

    mid = unet_blocks.MidBlock(levels[-1], config.mid_block_scale_factor, name="mid_block")
    x = mid(x, temb, text)

    for i, (level, block_type) in enumerate(zip(levels[::-1], config.up_block_types, strict=True)):
      level = dataclasses.replace(
        level, num_resnets=level.num_resnets + 1, has_attention=block_type.startswith("CrossAttn")
      )
      x = unet_blocks.UpBlock(level, i < last, name=f"up_blocks_{i}")(x, skips, temb, text)

    x = layers.GroupNorm(config.norm_num_groups, config.norm_eps, name="conv_norm_out")(x)
    return layers.Conv(config.out_channels, name="conv_out")(jax.nn.silu(x))

  def _time_embedding(self, t: Array, added: Mapping[str, Array] | None, dtype) -> Array:
    """[B] -> [B, 4 * block_out_channels[0]], with what XL adds to it."""
    config = self.config
    features = 4 * config.block_out_channels[0]
    raw = self._sinusoids(t, config.block_out_channels[0])
    temb = embeddings.EmbeddingMLP(features, name="time_embedding")(raw.astype(dtype))
    if config.addition_embed_type is None:
      return temb
    if added is None or not {"text_embeds", "time_ids"} <= added.keys():
      raise ValueError(
        "this UNet has addition_embed_type='text_time': expected added={'text_embeds': [B, P], "
        f"'time_ids': [B, 6]}}, got {added if added is None else sorted(added)}"
      )
    time_ids = added["time_ids"]
    assert config.addition_time_embed_dim is not None  # text_time needs it: _check_text_time
    raw = self._sinusoids(time_ids.reshape(-1), config.addition_time_embed_dim)
    raw = raw.reshape(time_ids.shape[0], -1).astype(dtype)
    raw = jnp.concatenate([added["text_embeds"].astype(dtype), raw], axis=-1)
    if raw.shape[-1] != config.projection_class_embeddings_input_dim:
      raise ValueError(
        "expected text_embeds and embedded time_ids of joint width "
        f"projection_class_embeddings_input_dim={config.projection_class_embeddings_input_dim}, "
        f"got text_embeds {added['text_embeds'].shape} and time_ids {time_ids.shape}"
      )
    return temb + embeddings.EmbeddingMLP(features, name="add_embedding")(raw)

  def _sinusoids(self, t: Array, dim: int) -> Array:
    flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
    return embeddings.timestep_embedding(t, dim, flip_sin_to_cos=flip, freq_shift=shift)
