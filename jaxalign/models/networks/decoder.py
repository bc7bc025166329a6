"""Decoder-only language models (Qwen3, Mistral, Qwen2.5-VL) as encoders of prompts.

One causal transformer with the parts of Llama (Touvron et al. 2023, arXiv:2302.13971, section 2.2):
RMSNorm, rotary positions, SwiGLU; and grouped-query attention (arXiv:2305.13245). Image models read
hidden states from inside of it, so that it stops at the last layer that is read. Parameter names
are those of transformers' `Qwen3Model` and its like: "model.layers.0..." without its "model.".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.checks import kinds
from jaxalign.models.networks import layers, rope
from jaxalign.types import Array

_QWEN2_5_VL = {
  "vocab_size": 152064,
  "hidden_size": 8192,
  "intermediate_size": 29568,
  "num_hidden_layers": 80,
  "num_attention_heads": 64,
  "num_key_value_heads": 8,
  "head_dim": None,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
}
# By model_type, what transformers takes where a config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "qwen3": {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
  },
  "mistral": {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
  },
  "qwen2_5_vl": _QWEN2_5_VL,  # folders from before its text model had a config of its own
  "qwen2_5_vl_text": _QWEN2_5_VL,
}
# Fields that have one value in every published encoder, the first; others would change numbers.
_FIXED: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "use_sliding_window": (False, None),
}
# Qwen2.5-VL turns shares of a head's channels (mrope_section) by time, row and column. A token of a
# text has its index for all three, which is plain rope, whatever the shares.
_ROPE_TYPES = ("default", "mrope")
_ROPE_FIELDS = ("rope_type", "type", "rope_theta", "mrope_section")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The fields of a language model's config.json that shape it; read them with `from_dict`.

  qk_norm: queries and keys of each head are normalised. No field of the file says so, nor
  qkv_bias: the projections to queries, keys and values have biases.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  qk_norm: bool
  qkv_bias: bool

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.type in (int, "int"):
        most = layers.MOST if field.name == "num_hidden_layers" else checks.MOST
        checks.check_range(f"DecoderConfig: {field.name}", getattr(self, field.name), 1, most)
    checks.check_range("DecoderConfig: rope_theta", self.rope_theta, 1)
    checks.check_range("DecoderConfig: rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
    if self.head_dim % 2:
      raise ValueError(
        f"DecoderConfig: head_dim: expected an even number, to turn channels in pairs, found "
        f"{self.head_dim}"
      )
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"DecoderConfig: num_attention_heads {self.num_attention_heads} not divisible by "
        f"num_key_value_heads {self.num_key_value_heads}"
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "DecoderConfig":
    """Reads a parsed config.json, or the `text_config` in that of a vision-language model.

    Raises ValueError for a field that asks for another network; other entries are left alone.
    """
    config = config.get("text_config") or config
    if not isinstance(config, Mapping):
      _refuse("text_config", {}, config)
    model_type = config.get("model_type")
    checks.check_choice("DecoderConfig: model_type", model_type, list(_DEFAULTS))
    _check_fixed(config)
    found = {name: config.get(name, value) for name, value in _DEFAULTS[model_type].items()}
    for name, default in _DEFAULTS[model_type].items():
      if found[name] is None and name not in ("head_dim", "num_key_value_heads"):
        found[name] = default
    if found["num_key_value_heads"] is None:
      found["num_key_value_heads"] = found["num_attention_heads"]
    if found["head_dim"] is None:
      found["head_dim"] = found["hidden_size"] // max(found["num_attention_heads"], 1)
    found["rope_theta"] = _rope_theta(config, found["rope_theta"])
    qwen2 = _DEFAULTS[model_type] is _QWEN2_5_VL
    return cls(**found, qk_norm=model_type == "qwen3", qkv_bias=qwen2)


def _check_fixed(config: Mapping[str, Any]) -> None:
  """Raises ValueError where a field asks for what is not here."""
  for name, values in _FIXED.items():
    if config.get(name, values[0]) not in values:
      _refuse(name, values[0], config[name])
  # Qwen's configs have a window that use_sliding_window switches off; Mistral's are used.
  if config["model_type"] == "mistral" and config.get("sliding_window", 4096) is not None:
    _refuse("sliding_window", None, config.get("sliding_window", "no such field, which means 4096"))
  kinds_of_layers = config.get("layer_types") or ()
  if not isinstance(kinds_of_layers, list | tuple):
    _refuse("layer_types", ["full_attention"], kinds_of_layers)
  for kind in kinds_of_layers:
    if kind != "full_attention":
      _refuse("layer_types", "full_attention", kind)


def _rope_theta(config: Mapping[str, Any], default: float) -> float:
  """The base of the rotary frequencies; ValueError for frequencies or positions that are scaled.

  transformers 5 writes it into `rope_parameters`, earlier ones beside `rope_scaling`.
  """
  name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
  found = config.get(name) or {}
  if not isinstance(found, Mapping):
    _refuse(name, {}, found)
  kind = found.get("rope_type", found.get("type", _ROPE_TYPES[0]))
  if kind not in _ROPE_TYPES:
    _refuse(f"{name}.rope_type", _ROPE_TYPES[0], kind)
  for field in sorted(found.keys() - set(_ROPE_FIELDS)):
    if found[field] is not None:
      _refuse(f"{name}.{checks.cut(field, 60)}", None, found[field])
  values = (found.get("rope_theta"), config.get("rope_theta"), default)
  theta = next(value for value in values if value is not None)
  if not kinds.fits(theta, float):
    raise ValueError(f"DecoderConfig: rope_theta: expected a number, found {checks.shown(theta)}")
  return theta


def _refuse(name: str, expected: Any, found: Any) -> None:
  raise ValueError(
    f"DecoderConfig: {name}: expected {expected!r}, the only one that is supported, found "
    f"{checks.shown(found)}"
  )


class DecoderModel(nn.Module):
  """The transformer without its head, `depths` of which are read; it has no layer past the last.

  depths: of the hidden states to return: 0 is the embedding, k what k layers make of it, and
    `num_hidden_layers` that behind the final norm, which all others are without.
  dtype: what it computes in, by name; None is that of the embeddings. Norms, logits and softmax are
    float32 always.
  """

  config: DecoderConfig
  depths: tuple[int, ...]
  dtype: str | None = None

  @nn.compact
  def __call__(self, token_ids: Array, mask: Array | None = None) -> tuple[Array, ...]:
    """Encodes prompts that are already padded to one length, on either side.

    Args:
      token_ids: `[B, N]` int.
      mask: `[B, N]` bool or 0 and 1; False for padding, which no token attends to.

    Returns:
      For each of `depths` `[B, N, D]`; the rows of padding included.
    """
    config, length = self.config, token_ids.shape[1]
    self._check_depths()
    x = layers.Embed(config.vocab_size, config.hidden_size, name="embed_tokens")(token_ids)
    x = x.astype(self.dtype or x.dtype)
    allowed = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if mask is not None:
      allowed = allowed & jnp.asarray(mask, bool)[:, None, None]
    # From 0 on whatever the padding, as transformers has it: only differences of positions count.
    turn = rope.table(np.arange(length)[:, None], (config.head_dim,), config.rope_theta)
    states = [x]
    for i in range(max(self.depths)):
      states.append(DecoderLayer(config, name=f"layers_{i}")(states[-1], turn, allowed))
    if len(states) > config.num_hidden_layers:
      states[-1] = layers.RMSNorm(config.rms_norm_eps, name="norm")(states[-1])
    return tuple(states[depth] for depth in self.depths)

  def _check_depths(self):
    deepest = self.config.num_hidden_layers
    if not self.depths or not all(0 <= depth <= deepest for depth in self.depths):
      raise ValueError(
        f"DecoderModel: depths: expected some from 0 to {deepest} (num_hidden_layers), found "
        f"{checks.shown(self.depths)}"
      )


class DecoderLayer(nn.Module):
  """Pre-norm self-attention and MLP, each with a residual connection."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: Array, turn: rope.Table, mask: Array) -> Array:
    config = self.config
    h = layers.RMSNorm(config.rms_norm_eps, name="input_layernorm")(x)
    x = x + SelfAttention(config, name="self_attn")(h, turn, mask)
    h = layers.RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(x)
    return x + SwiGLU(config.intermediate_size, name="mlp")(h)


class SelfAttention(nn.Module):
  """Grouped-query self-attention: several heads of queries share one of keys and values."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: Array, turn: rope.Table, mask: Array) -> Array:
    """`[B, N, D]` to `[B, N, D]`.

    Args:
      turn: `rope.table` of the N positions.
      mask: bool, `[1, 1, N, N]` or `[B, 1, N, N]`.
    """
    config = self.config
    query = self._heads(x, config.num_attention_heads, "q_proj")
    key = self._heads(x, config.num_key_value_heads, "k_proj")
    value = self._heads(x, config.num_key_value_heads, "v_proj")
    if config.qk_norm:
      query = layers.RMSNorm(config.rms_norm_eps, name="q_norm")(query)
      key = layers.RMSNorm(config.rms_norm_eps, name="k_norm")(key)
    query, key = rope.rotate_halves(query, turn), rope.rotate_halves(key, turn)
    shared_by = config.num_attention_heads // config.num_key_value_heads
    key, value = (jnp.repeat(heads, shared_by, axis=2) for heads in (key, value))
    out = layers.attention(query, key, value, mask)
    # Padding on the left sees nothing, not even itself, and PyTorch's attention makes 0 of that.
    # FLUX.2 reads these rows too.
    out = jnp.where(jnp.any(mask, axis=-1)[:, 0, :, None], out, 0)
    return layers.Dense(x.shape[-1], use_bias=False, name="o_proj")(out)

  def _heads(self, x: Array, count: int, name: str) -> Array:  # [B, N, D] -> [B, N, count, D']
    width = count * self.config.head_dim
    projected = layers.Dense(width, use_bias=self.config.qkv_bias, name=name)(x)
    return projected.reshape(*x.shape[:2], count, self.config.head_dim)


class SwiGLU(nn.Module):
  """`down_proj(silu(gate_proj(x)) * up_proj(x))` (Shazeer 2020, arXiv:2002.05202)."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
    gate, value = (
      layers.Dense(self.features, use_bias=False, name=name)(x) for name in ("gate_proj", "up_proj")
    )
    return layers.Dense(x.shape[-1], use_bias=False, name="down_proj")(jax.nn.silu(gate) * value)
