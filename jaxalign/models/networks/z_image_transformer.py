"""The single-stream transformer of Z-Image, driven by its config.json.

Z-Image Team 2025, arXiv:2511.22699. Module names are diffusers', and so are those of the fields.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

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
  packing,
  rematerialization,
  rope,
)
from jaxalign.types import Array

MULTIPLE = 32  # of tokens, which learned ones fill each caption and each image up to
_SINUSOIDS = 256  # of the time
_TIME_HIDDEN, _TIME_WIDTH = 1024, 256  # of its embedding; the latter at most
_HEAD_EPSILON = 1e-5  # of the norms of queries and keys, whatever norm_eps is
_SUPPORTED = {"all_f_patch_size": (1,), "siglip_feat_dim": None}  # of fields that we do not have
# With the one that diffusers' network takes and does not use.
FIXED = {**{name: (value,) for name, value in _SUPPORTED.items()}, "n_kv_heads": (30,)}


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
  """The fields of `transformer/config.json`, with diffusers' defaults.

  `n_kv_heads` is not among them: diffusers' network takes it and does not use it.
  """

  all_patch_size: tuple[int, ...] = (2,)
  in_channels: int = 16
  dim: int = 3840
  n_layers: int = 30
  n_refiner_layers: int = 2
  n_heads: int = 30
  norm_eps: float = 1e-5
  qk_norm: bool = True
  cap_feat_dim: int = 2560
  rope_theta: float = 256.0
  t_scale: float = 1000.0
  axes_dims: tuple[int, ...] = (32, 48, 48)
  axes_lens: tuple[int, ...] = (1024, 512, 512)

  def __post_init__(self):
    counts = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim")
    limits = {name: (1, layers.MOST if "layers" in name else checks.MOST) for name in counts}
    limits |= {"norm_eps": (0.0, 1.0), "rope_theta": (1.0,), "t_scale": (0.0,)}
    for name, limit in limits.items():
      checks.check_range(f"transformer config: {name}", getattr(self, name), *limit)
    for name, count in {"all_patch_size": 1, "axes_lens": 3}.items():
      found = getattr(self, name)
      if len(found) != count or min(found) < 1:
        raise ValueError(
          f"transformer config: {name}: expected length {count} and entries from 1 on, found "
          f"{checks.shown(found)}"
        )
    if self.dim % self.n_heads:
      raise ValueError(
        f"transformer config: expected dim to be a multiple of n_heads, found {self.dim} and "
        f"{self.n_heads}"
      )
    rope.check_axes("axes_dims", self.axes_dims, 3, self.dim // self.n_heads)

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "ZImageConfig":
    """Reads the parsed `transformer/config.json`; entries that no field is named after are left.

    Raises ValueError where one of those would change the network.
    """
    for name, value in _SUPPORTED.items():
      found = config.get(name, value)
      if (tuple(found) if isinstance(found, list) else found) != value:
        raise ValueError(
          f"transformer config: expected {name} to be {value}, found {checks.shown(found)}"
        )
    return cls(**config_fields.of(cls, config))


class ZImageTransformer2DModel(nn.Module):
  """Predicts the velocity of a rectified flow from noisy latents, time and captions.

  Its time runs from noise to data, and its velocity with it: for latents at the noise level sigma
  it takes `t = 1 - sigma` and predicts `x_0 - noise`. Who calls it turns both around.

  It computes in the dtype of `x_t`; norms, attention logits and the sinusoids are float32. `remat`
  says what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  config: ZImageConfig
  remat: str = "none"

  @nn.compact
  def __call__(self, x_t: Array, t: Array, text: Array, length: Array) -> Array:
    """Runs the network.

    Captions and images are filled up to multiples of 32 tokens with learned ones, which are
    attended to like any other. What `text` has beyond that is there for the batch, and masked.

    Args:
      x_t: `[B, H, W, in_channels]`; H and W multiples of the patch size, at most `axes_lens[1]` and
        `axes_lens[2]` patches.
      t: `[B]`, or `[1]` for the whole batch, 1 - sigma; `t_scale` is applied here.
      text: `[B, N, cap_feat_dim]`; N a multiple of 32 and at most `axes_lens[0] - 2`.
      length: `[B]` int, the real tokens of each caption, at most N; others have no effect.

    Returns:
      `[B, H, W, in_channels]`, the dtype of `x_t`.
    """
    config, dtype, num_text = self.config, x_t.dtype, text.shape[1]
    patch, (rows, columns) = config.all_patch_size[0], _grid(config, x_t.shape[1:3], num_text)
    embed_time = TimeEmbedding(min(config.dim, _TIME_WIDTH), name="t_embedder")
    embedding = embed_time(jnp.asarray(t, jnp.float32) * config.t_scale, dtype)
    x = self._filled_image(PatchEmbedder(config.dim, patch, name="all_x_embedder")(x_t))
    text = self._filled_text(text.astype(dtype), length)
    filled = -(-length // MULTIPLE) * MULTIPLE  # [B], each caption with its learned tokens
    text_mask = jnp.arange(num_text) < filled[:, None]
    mask = jnp.concatenate([jnp.ones(x.shape[:2], bool), text_mask], axis=1)
    turn = _turns(config, filled, (rows, columns), num_text)
    of_image, of_text = zip(*(jnp.split(part, [x.shape[1]], axis=1) for part in turn), strict=True)

    kind = rematerialization.rematerialized(Block, self.remat)
    block = functools.partial(kind, config.n_heads, config.norm_eps, config.qk_norm)
    for k in range(config.n_refiner_layers):
      x = block(name=f"noise_refiner_{k}")(x, embedding, of_image, None)
      text = block(name=f"context_refiner_{k}")(text, None, of_text, text_mask)
    x = jnp.concatenate([x, text], axis=1)
    for k in range(config.n_layers):
      x = block(name=f"layers_{k}")(x, embedding, turn, mask)
    head = OutputHead(config.in_channels, patch, name="all_final_layer")
    return head(x[:, : rows * columns].reshape(-1, rows, columns, config.dim), embedding)

  def _filled_image(self, x: Array) -> jax.Array:  # [B, T, dim], T rounded up
    learned = layers.parameter(self, "x_pad_token", nn.initializers.zeros, (1, x.shape[2]))
    shape = (x.shape[0], -x.shape[1] % MULTIPLE, x.shape[2])
    return jnp.concatenate([x, jnp.broadcast_to(learned, shape).astype(x.dtype)], axis=1)

  def _filled_text(self, text: Array, length: Array) -> jax.Array:  # [B, N, C] -> [B, N, dim]
    text = layers.RMSNorm(self.config.norm_eps, name="cap_embedder_0")(text)
    text = layers.Dense(self.config.dim, name="cap_embedder_1")(text)
    learned = layers.parameter(self, "cap_pad_token", nn.initializers.zeros, (1, text.shape[2]))
    real = jnp.arange(text.shape[1]) < length[:, None]
    return jnp.where(real[..., None], text, jnp.asarray(learned).astype(text.dtype))


def _grid(config: ZImageConfig, size: tuple[int, ...], num_text: int) -> tuple[int, int]:
  """Rows and columns of image tokens; ValueError for inputs that the network has no place for."""
  patch, (most_text, most_rows, most_columns) = config.all_patch_size[0], config.axes_lens
  if num_text % MULTIPLE or num_text > most_text - 2:
    raise ValueError(
      f"expected captions padded to a multiple of {MULTIPLE} tokens, at most {most_text - 2} "
      f"(axes_lens), got {num_text}"
    )
  rows, columns = (pixels // patch for pixels in size)
  if size != (rows * patch, columns * patch) or rows > most_rows or columns > most_columns:
    raise ValueError(
      f"expected latents with sides that are multiples of {patch}, at most {patch * most_rows} x "
      f"{patch * most_columns} (axes_lens), got {size[0]} x {size[1]}"
    )
  return rows, columns


def _turns(
  config: ZImageConfig, filled: Array, size: tuple[int, int], num_text: int
) -> joint_attention.Turn:
  """Rotations of all tokens, those of the image first.

  Token j of a caption is at (1 + j, 0, 0), also if it is a learned one; those of the image are at
  (1 + the caption's filled length, row, column), and the learned ones behind them at (0, 0, 0).
  """
  num_image = size[0] * size[1]
  start = num_image + -num_image % MULTIPLE  # of the caption
  ids, in_image = np.zeros((start + num_text, 3), np.int32), np.zeros(start + num_text, np.int32)
  ids[:num_image, 1:], in_image[:num_image] = np.indices(size).reshape(2, -1).T, 1
  ids[start:, 0] = 1 + np.arange(num_text)
  # On the first axis positions depend on the caption: they are looked up when the program runs.
  first = rope.table(np.arange(num_text + 2)[:, None], config.axes_dims[:1], config.rope_theta)
  rest = rope.table(ids[:, 1:], config.axes_dims[1:], config.rope_theta)
  position = ids[:, 0] + in_image * (1 + filled[:, None])  # [B, S]
  cos, sin = (
    jnp.concatenate([jnp.asarray(a)[position], jnp.tile(b, (len(filled), 1, 1))], axis=-1)
    for a, b in zip(first, rest, strict=True)
  )
  return cos, sin


class TimeEmbedding(nn.Module):
  """Sinusoids of the time through two linear maps around a SiLU."""

  features: int

  @nn.compact
  def __call__(self, t: Array, dtype: Any) -> Array:  # [B] -> [B, features]
    raw = embeddings.timestep_embedding(t, _SINUSOIDS, flip_sin_to_cos=True, freq_shift=0)
    hidden = layers.Dense(_TIME_HIDDEN, name="mlp_0")(raw.astype(dtype))
    return layers.Dense(self.features, name="mlp_2")(jax.nn.silu(hidden))


class PatchEmbedder(nn.Module):
  """Patches to tokens, row by row, by the linear map that is for their size."""

  features: int
  patch: int

  @nn.compact
  def __call__(self, x_t: Array) -> Array:  # [B, H, W, C] -> [B, T, features]
    x = packing.tokens([packing.pack(x_t, "dy_dx_c", self.patch)])
    return layers.Dense(self.features, name=f"{self.patch}-1")(x)


class OutputHead(nn.Module):
  """Tokens to patches, by the final layer that is for their size."""

  channels: int
  patch: int

  @nn.compact
  def __call__(self, x: Array, embedding: Array) -> Array:  # [B, rows, columns, D] -> [B, H, W, C]
    features = self.patch**2 * self.channels
    x = FinalLayer(features, name=f"{self.patch}-1")(x, embedding)
    return packing.unpack(x, "dy_dx_c", self.patch)


class FinalLayer(nn.Module):
  """A layer norm whose scale comes from the time, and a linear map."""

  features: int

  @nn.compact
  def __call__(self, x: Array, embedding: Array) -> Array:  # [B, .., D] -> [B, .., features]
    scale = layers.Dense(x.shape[-1], name="adaLN_modulation_1")(jax.nn.silu(embedding))
    x_32 = layers.standardized(x, modulation.EPSILON) * (1.0 + scale[:, None, None])
    return layers.Dense(self.features, name="linear")(x_32.astype(x.dtype))


class Block(nn.Module):
  """Attention and a feed-forward network, each between two norms and modulated.

  The time scales what a branch reads and, through a tanh, what it adds; it shifts nothing.
  """

  num_heads: int
  epsilon: float
  normalize: bool

  @nn.compact
  def __call__(
    self, x: Array, embedding: Array | None, turn: joint_attention.Turn, mask: Array | None
  ) -> Array:
    """`x` `[B, S, D]` to the same; `embedding` `[B, E]`, or None where there is no modulation."""
    norm = functools.partial(layers.RMSNorm, self.epsilon)
    (scale, gate), (scale_2, gate_2) = self._modulations(x.shape[-1], embedding)
    attend = joint_attention.SelfAttention(
      self.num_heads, False, self.normalize, _HEAD_EPSILON, name="attention"
    )
    out = attend(norm(name="attention_norm1")(x) * scale, turn, mask)
    x = x + gate * norm(name="attention_norm2")(out)
    hidden = feed_forward.SwiGLU(8 * x.shape[-1] // 3, name="feed_forward")
    out = hidden(norm(name="ffn_norm1")(x) * scale_2)
    return x + gate_2 * norm(name="ffn_norm2")(out)

  def _modulations(self, width: int, embedding: Array | None) -> list[tuple[Any, Any]]:
    """Factors of the input and of the output of both branches, `[B, 1, D]` each."""
    if embedding is None:
      return [(1.0, 1.0)] * 2
    projected = layers.Dense(4 * width, name="adaLN_modulation_0")(embedding)[:, None]
    parts = jnp.split(projected, 4, axis=-1)
    return [(1.0 + scale, jnp.tanh(gate)) for scale, gate in (parts[:2], parts[2:])]
