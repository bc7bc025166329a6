"""The MMDiT of Qwen-Image and of its Edit versions, driven by its config.json.

Qwen Team 2025, arXiv:2508.02324, section 2.4; its blocks are those of Esser et al. 2024,
arXiv:2403.03206, with rotated queries and keys. Module names are diffusers', and so are those of
the fields.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.models.networks import (
  config_fields,
  embeddings,
  feed_forward,
  joint_attention,
  layers,
  modulation,
  rematerialization,
  rope,
)
from jaxalign.types import Array

_THETA = 10000.0  # of the rotations
# Fields that we do not have: those of guidance-distilled and of layered versions.
FIXED = dict.fromkeys(("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"), (False,))


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
  """The fields of `transformer/config.json`, with diffusers' defaults."""

  patch_size: int = 2
  in_channels: int = 64
  out_channels: int = 16
  num_layers: int = 60
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 3584
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)
  zero_cond_t: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.type in (int, "int"):
        most = layers.MOST if field.name == "num_layers" else checks.MOST
        where = f"transformer config: {field.name}"
        checks.check_range(where, getattr(self, field.name), 1, most)
    rope.check_axes("axes_dims_rope", self.axes_dims_rope, 3, self.attention_head_dim)

  @property
  def width(self) -> int:
    """D of image and text tokens inside."""
    return self.num_attention_heads * self.attention_head_dim

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "QwenImageConfig":
    """Reads the parsed `transformer/config.json`; entries that no field is named after are left.

    Raises ValueError where one of those would change the network.
    """
    for name in FIXED:
      if config.get(name):
        raise ValueError(
          f"transformer config: expected {name} false, found {checks.shown(config[name])}"
        )
    found = config_fields.of(cls, config)
    if found.get("out_channels", 0) is None:
      found["out_channels"] = found.get("in_channels", cls.in_channels)
    return cls(**found)


class QwenImageTransformer2DModel(nn.Module):
  """Predicts the velocity of a rectified flow from noisy latents, time, text and reference images.

  It computes in the dtype of `x_t`; norms, attention logits and the sinusoids are float32. `remat`
  says what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  config: QwenImageConfig
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    x_t: Array,
    t: Array,
    text: Array,
    mask: Array | None = None,
    references: Sequence[Array] = (),
  ) -> Array:
    """Runs the network.

    Args:
      x_t: `[B, H, W, in_channels]`, packed: a pixel for each patch of the latents.
      t: `[B]`, or `[1]` for the whole batch, 1000 sigma.
      text: `[B, N, joint_attention_dim]`, padded.
      mask: `[B, N]` bool, False for padding, which nothing attends to; None: there is none.
      references: images to edit, packed, without noise, `[B, h, w, in_channels]` each, any sizes.

    Returns:
      `[B, H, W, patch_size ** 2 * out_channels]`, the dtype of `x_t`.
    """
    config, dtype = self.config, x_t.dtype
    images = [x_t, *references]
    sizes = [image.shape[1:3] for image in images]
    targets = sizes[0][0] * sizes[0][1]
    maps = [image.astype(dtype).reshape(image.shape[0], -1, image.shape[-1]) for image in images]
    x = layers.Dense(config.width, name="img_in")(jnp.concatenate(maps, axis=1))
    text = layers.RMSNorm(name="txt_norm")(text.astype(dtype))
    text = layers.Dense(config.width, name="txt_in")(text)
    apart = config.zero_cond_t and len(images) > 1
    times = jnp.append(t, 0.0) if apart else t
    embedding = embeddings.TimeEmbedding(config.width, name="time_text_embed")(times, dtype)
    turn = rope.table(positions(sizes, text.shape[1]), config.axes_dims_rope, _THETA)
    if mask is not None:
      mask = jnp.concatenate([mask, jnp.ones(x.shape[:2], bool)], axis=1)

    kind = rematerialization.rematerialized(Block, self.remat)
    for k in range(config.num_layers):
      block = kind(
        config.num_attention_heads, targets if apart else None, name=f"transformer_blocks_{k}"
      )
      x, text = block(x, text, embedding, turn, mask)
    embedding = embedding[:-1] if apart else embedding
    x = modulation.ContinuousAdaLN(name="norm_out")(x[:, :targets], embedding)
    x = layers.Dense(config.patch_size**2 * config.out_channels, name="proj_out")(x)
    return x.reshape(x.shape[0], *sizes[0], -1)


def positions(sizes: Sequence[tuple[int, ...]], num_text: int) -> np.ndarray:
  """Positions (image, row, column) of all tokens, text first, `[N + T, 3]`.

  Rows and columns count from the middle of their image. The text goes on along the diagonal, from
  the farthest of them.

  Args:
    sizes: rows and columns of each image, the target first.
    num_text: N.
  """
  first = max(side // 2 for size in sizes for side in size)
  ids = [np.repeat(first + np.arange(num_text)[:, None], 3, axis=1)]
  for k, size in enumerate(sizes):
    grid = np.indices(size).reshape(2, -1).T - [side - side // 2 for side in size]
    ids.append(np.concatenate([np.full((len(grid), 1), k), grid], axis=1))
  return np.concatenate(ids)


class TwoModulations(NamedTuple):
  """A modulation of the first `num_first` tokens, and another one of those behind them."""

  first: modulation.Modulation
  rest: modulation.Modulation
  num_first: int

  def of(self, x: Array) -> jax.Array:
    """The branch's input, as `Modulation.of`."""
    parts = (part.of(tokens) for part, tokens in zip(self[:2], self._cut(x), strict=True))
    return jnp.concatenate(list(parts), axis=1)

  def add(self, x: Array, branch: Array) -> jax.Array:
    """`x` plus the branch's output behind its gates."""
    each = zip(self[:2], self._cut(x), self._cut(branch), strict=True)
    return jnp.concatenate([part.add(tokens, out) for part, tokens, out in each], axis=1)

  def _cut(self, x: Array) -> tuple[Array, Array]:
    return x[:, : self.num_first], x[:, self.num_first :]


class Block(nn.Module):
  """Joint attention and a feed-forward network for image and text, all modulated by the time.

  targets: how many image tokens are of the image that is made, where those behind them are
    modulated as at time 0, by the last row of the embedding; None: all are modulated alike.
  """

  num_heads: int
  targets: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    text: Array,
    embedding: Array,
    turn: joint_attention.Turn,
    mask: Array | None,
  ) -> tuple[Array, Array]:
    """Image and text tokens after the block.

    Args:
      x: `[B, T, D]`.
      text: `[B, N, D]`.
      embedding: `[B, D]` or `[1, D]`, of the time; with `targets` one row more.
      turn, mask: as in `JointAttention`.
    """
    of_time = embedding if self.targets is None else embedding[:-1]
    attend = joint_attention.JointAttention(self.num_heads, name="attn")
    return joint_attention.residuals(
      x,
      text,
      self._of_image(self._projected(embedding, "img_mod_1")),
      modulation.split(self._projected(of_time, "txt_mod_1"), 2),
      functools.partial(attend, turn=turn, mask=mask),
      feed_forward.FeedForward(name="img_mlp"),
      feed_forward.FeedForward(name="txt_mlp"),
    )

  def _projected(self, embedding: Array, name: str) -> Array:  # [B, D] -> [B, 6 D]
    return layers.Dense(6 * embedding.shape[-1], name=name)(jax.nn.silu(embedding))

  def _of_image(self, projected: Array) -> list[modulation.Modulation | TwoModulations]:
    """The modulations of both branches."""
    if self.targets is None:
      return list(modulation.split(projected, 2))
    at_time, at_zero = (modulation.split(rows, 2) for rows in (projected[:-1], projected[-1:]))
    pairs = zip(at_time, at_zero, strict=True)
    return [TwoModulations(*pair, self.targets) for pair in pairs]
