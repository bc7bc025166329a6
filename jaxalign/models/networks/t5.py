"""The T5 v1.1 text encoder: token ids to one vector per token.

The encoder of Raffel et al. 2019 (arXiv:1910.10683, section 2.1) with the gated feed-forward
network of Shazeer 2020 (arXiv:2002.05202), under the parameter names of transformers'
`T5EncoderModel`. Its activations leave the range of float16: float32 or bfloat16 only.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.models.networks import config_fields, layers
from jaxalign.types import Array


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The fields of `config.json` that shape the encoder, with transformers' defaults."""

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = "relu"

  def __post_init__(self):
    # Two directions, and distances one by one as well as ranges of them in each.
    least = {"relative_attention_num_buckets": 4}
    for field in dataclasses.fields(self):
      if field.type in (int, "int"):
        most = layers.MOST if field.name == "num_layers" else checks.MOST
        value = getattr(self, field.name)
        checks.check_range(f"T5Config: {field.name}", value, least.get(field.name, 1), most)
    checks.check_range(
      "T5Config: relative_attention_max_distance",
      self.relative_attention_max_distance,
      self.relative_attention_num_buckets // 4 + 1,
    )
    checks.check_range("T5Config: layer_norm_epsilon", self.layer_norm_epsilon, 0.0, 1.0)
    checks.check_choice("T5Config: feed_forward_proj", self.feed_forward_proj, ("gated-gelu",))

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
    """Reads the encoder's parsed config.json; other entries are left alone.

    Raises ValueError for a relative of T5 (UMT5 has a position bias in each layer).
    """
    checks.check_choice("T5Config: model_type", config.get("model_type", "t5"), ("t5",))
    return cls(**config_fields.of(cls, config))


class T5EncoderModel(nn.Module):
  """The encoder with its embeddings, which T5 shares with a decoder, hence `shared`.

  dtype: what it computes in, by name; None is that of the embeddings. Norms, logits and softmax are
    float32 always.
  """

  config: T5Config
  dtype: str | None = None

  @nn.compact
  def __call__(self, token_ids: Array, mask: Array | None = None) -> Array:
    """Encodes prompts that are already padded to one length.

    Args:
      token_ids: `[B, N]` int.
      mask: `[B, N]` bool or 0 and 1; False for tokens that nothing attends to. Without one padding
        is attended to.

    Returns:
      `[B, N, D]`, after the final norm; the rows of padding included.
    """
    config = self.config
    x = layers.Embed(config.vocab_size, config.d_model, name="shared")(token_ids)
    x = x.astype(self.dtype or x.dtype)
    if mask is not None:
      mask = jnp.asarray(mask, bool)[:, None, None]
    return Encoder(config, name="encoder")(x, mask)


class Encoder(nn.Module):
  """The stack of blocks and the final norm, `[B, N, D]` to `[B, N, D]`."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    bias = None
    for i in range(self.config.num_layers):
      x, bias = Block(self.config, name=f"block_{i}")(x, bias, mask)
    return layers.RMSNorm(self.config.layer_norm_epsilon, name="final_layer_norm")(x)


class Block(nn.Module):
  """Self-attention, then a feed-forward network."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array, bias: Array | None, mask: Array | None) -> tuple[Array, Array]:
    x, bias = AttentionLayer(self.config, name="layer_0")(x, bias, mask)
    return FeedForwardLayer(self.config, name="layer_1")(x), bias


class AttentionLayer(nn.Module):
  """Pre-norm self-attention with a residual connection; hands on its position bias."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array, bias: Array | None, mask: Array | None) -> tuple[Array, Array]:
    h = layers.RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
    h, bias = SelfAttention(self.config, name="SelfAttention")(h, bias, mask)
    return x + h, bias


class SelfAttention(nn.Module):
  """Multi-head self-attention without biases and without a scale, but with a position bias."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array, bias: Array | None, mask: Array | None) -> tuple[Array, Array]:
    """The output `[B, N, D]` and the bias, which the first layer makes for all others.

    Args:
      x: `[B, N, D]`.
      bias: `[1, H, N, N]` float32, or None in the first layer.
      mask: bool `[B, 1, 1, N]`.
    """
    config = self.config
    if bias is None:
      count = config.relative_attention_num_buckets
      buckets = position_buckets(x.shape[1], count, config.relative_attention_max_distance)
      table = layers.Embed(count, config.num_heads, name="relative_attention_bias")
      bias = table(buckets).astype(jnp.float32).transpose(2, 0, 1)[None]
    width = config.num_heads * config.d_kv
    query, key, value = (
      layers.Dense(width, use_bias=False, name=name)(x).reshape(
        *x.shape[:2], config.num_heads, config.d_kv
      )
      for name in ("q", "k", "v")
    )
    # `layers.attention` adds nothing to logits. They are float32 here too, and held all at once:
    # prompts are short, and each is encoded once.
    out = jax.nn.dot_product_attention(
      query, key, value, bias=bias, mask=mask, scale=1.0, implementation="xla"
    )
    out = out.reshape(*x.shape[:2], width)
    return layers.Dense(x.shape[-1], use_bias=False, name="o")(out), bias


def position_buckets(length: int, count: int, max_distance: int) -> np.ndarray:
  """The bucket of each query's distance to each key, `[N, N]` int, below `count`.

  Half of the buckets are for keys to the right. In each half the first `count // 4` are for one
  distance each and the others for ranges that grow geometrically; the last has no end.
  """
  half, single = count // 2, count // 4
  offset = np.arange(length)[None] - np.arange(length)[:, None]
  distance = np.abs(offset)
  growth = np.log(np.maximum(distance, single) / single) / np.log(max_distance / single)
  ranged = single + (growth * (half - single)).astype(int)
  bucket = np.where(distance < single, distance, np.minimum(ranged, half - 1))
  return bucket + half * (offset > 0)


class FeedForwardLayer(nn.Module):
  """Pre-norm feed-forward network with a residual connection."""

  config: T5Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = layers.RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
    return x + GatedGELU(self.config.d_ff, name="DenseReluDense")(h)


class GatedGELU(nn.Module):
  """`wo(gelu(wi_0(x)) * wi_1(x))`, the GELU by its tanh (GEGLU of arXiv:2002.05202)."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
    gate, value = (
      layers.Dense(self.features, use_bias=False, name=name)(x) for name in ("wi_0", "wi_1")
    )
    hidden = jax.nn.gelu(gate, approximate=True) * value
    return layers.Dense(x.shape[-1], use_bias=False, name="wo")(hidden)
