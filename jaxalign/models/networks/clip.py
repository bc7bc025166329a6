"""The CLIP text encoders: token ids to one vector per token and one per prompt.

The transformer of Radford et al. 2021 (arXiv:2103.00020, section 2.4), under the parameter names
of transformers' `CLIPTextModel` and `CLIPTextModelWithProjection` as published checkpoints store
them. `Encoder` and what it is made of serve the image tower as well, see `clip_vision`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.networks import config_fields, layers
from jaxalign.types import Array


def quick_gelu(x: Array) -> Array:
  """`x * sigmoid(1.702 x)`, the approximation that OpenAI's checkpoints were trained with."""
  return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
  """`x * Phi(x)`, exact."""
  return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
_NO_SIZES = ("eos_token_id",)  # may be 0

# Configs written before transformers 4.32 say 2, whatever the vocabulary's end-of-text id is.
_LEGACY_EOS_TOKEN_ID = 2


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """What the encoder of either tower is shaped by."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  hidden_act: str
  layer_norm_eps: float

  def __post_init__(self):
    name = type(self).__name__
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, "int") and field.name not in _NO_SIZES:
        most = layers.MOST if field.name == "num_hidden_layers" else checks.MOST
        checks.check_range(f"{name}: {field.name}", value, 1, most)
    checks.check_range(f"{name}: layer_norm_eps", self.layer_norm_eps, 0.0, 1.0)
    checks.check_range(f"{name}: eos_token_id", getattr(self, "eos_token_id", 0), 0, checks.MOST)
    if self.hidden_act not in _ACTIVATIONS:
      raise ValueError(
        f"{name}: expected hidden_act in {sorted(_ACTIVATIONS)}, found "
        f"{checks.shown(self.hidden_act)}"
      )
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f"{name}: hidden_size {self.hidden_size} not divisible by "
        f"num_attention_heads {self.num_attention_heads}"
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> Self:
    """Reads the tower's parsed config; other entries are left alone."""
    return cls(**config_fields.of(cls, config))


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(EncoderConfig):
  """The fields of `text_encoder/config.json` that shape the network or its pooling."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407
  projection_dim: int = 512


class EncodedText(NamedTuple):
  """What a text encoder says of prompts.

  hidden: `[B, N, D]`, after the final layer norm.
  pooled: `[B, D]`, of `hidden` the vector at the end-of-text token; projected to `[B, P]` by an
    encoder with a projection.
  penultimate: `[B, N, D]`, what the last layer reads, without the final layer norm.
  """

  hidden: Array
  pooled: Array
  penultimate: Array


class CLIPTextModel(nn.Module):
  """The text encoder; a shell around `text_model`, because published names start with it."""

  config: CLIPTextConfig

  @nn.compact
  def __call__(self, token_ids: Array) -> EncodedText:
    """As `TextTransformer`."""
    return TextTransformer(self.config, name="text_model")(token_ids)


class CLIPTextModelWithProjection(nn.Module):
  """The text encoder and the projection into the space that it shares with images."""

  config: CLIPTextConfig

  @nn.compact
  def __call__(self, token_ids: Array) -> EncodedText:
    """As `TextTransformer`, `pooled` projected to `[B, projection_dim]`."""
    encoded = TextTransformer(self.config, name="text_model")(token_ids)
    projection = layers.Dense(self.config.projection_dim, use_bias=False, name="text_projection")
    return encoded._replace(pooled=projection(encoded.pooled))


class TextTransformer(nn.Module):
  """Embeddings, causal transformer, final layer norm."""

  config: CLIPTextConfig

  @nn.compact
  def __call__(self, token_ids: Array) -> EncodedText:
    """Encodes prompts that are already padded to one length.

    Padding needs no mask: no token sees a later one.

    Args:
      token_ids: `[B, N]` int, N at most `max_position_embeddings`.
    """
    length = token_ids.shape[-1]
    if length > self.config.max_position_embeddings:
      raise ValueError(
        f"expected at most {self.config.max_position_embeddings} tokens per prompt, found "
        f"{length}; truncate the prompts"
      )
    x = Embeddings(self.config, name="embeddings")(token_ids)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    last, penultimate = Encoder(self.config, name="encoder")(x, causal)
    hidden = layers.LayerNorm(self.config.layer_norm_eps, name="final_layer_norm")(last)
    end = end_positions(token_ids, self.config.eos_token_id)
    pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    return EncodedText(hidden, pooled, penultimate)


def end_positions(token_ids: Array, eos_token_id: int) -> Array:  # [B, N] -> [B]
  """The first end-of-text token of each prompt (padding often repeats it)."""
  if eos_token_id == _LEGACY_EOS_TOKEN_ID:
    return jnp.argmax(token_ids, axis=-1)  # end-of-text is the last entry of CLIP's vocabulary
  return jnp.argmax(token_ids == eos_token_id, axis=-1)


class Embeddings(nn.Module):
  """Token plus position embeddings."""

  config: CLIPTextConfig

  @nn.compact
  def __call__(self, token_ids: Array) -> Array:
    config = self.config
    tokens = layers.Embed(config.vocab_size, config.hidden_size, name="token_embedding")
    positions = layers.Embed(
      config.max_position_embeddings, config.hidden_size, name="position_embedding"
    )
    return tokens(token_ids) + positions(jnp.arange(token_ids.shape[-1]))


class Encoder(nn.Module):
  """The stack of layers under one mask, `[B, N, D]` to the output and the input of its last one."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None) -> tuple[Array, Array]:
    penultimate = x
    for i in range(self.config.num_hidden_layers):
      penultimate, x = x, EncoderLayer(self.config, name=f"layers_{i}")(x, mask)
    return x, penultimate


class EncoderLayer(nn.Module):
  """Pre-norm self-attention and MLP, each with a residual connection."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    config = self.config
    h = layers.LayerNorm(config.layer_norm_eps, name="layer_norm1")(x)
    x = x + SelfAttention(config.num_attention_heads, name="self_attn")(h, mask)
    h = layers.LayerNorm(config.layer_norm_eps, name="layer_norm2")(x)
    return x + MLP(config, name="mlp")(h)


class SelfAttention(nn.Module):
  """Multi-head self-attention with biases everywhere."""

  num_heads: int

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    features = x.shape[-1]
    query, key, value = (
      layers.Dense(features, name=name)(x).reshape(*x.shape[:2], self.num_heads, -1)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    return layers.Dense(features, name="out_proj")(layers.attention(query, key, value, mask))


class MLP(nn.Module):
  """`fc2(act(fc1(x)))`."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = layers.Dense(self.config.intermediate_size, name="fc1")(x)
    return layers.Dense(x.shape[-1], name="fc2")(_ACTIVATIONS[self.config.hidden_act](h))
