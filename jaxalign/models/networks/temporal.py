"""An MLP-mixer over time: a small denoiser of plans, told where to start and where to go.

Way points are mixed along time, then channels at each of them (Tolstikhin et al. 2021,
arXiv:2105.01601, section 2); time and condition scale and shift what goes into each (Peebles and
Xie 2022, arXiv:2212.09748, section 3.2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import embeddings, layers
from jaxalign.types import Array


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
  """Sizes of the network.

  horizon: way points of a plan, H; dim: numbers of each, A. width: channels inside. num_layers:
  blocks. time_width, channel_width: hidden units of the two MLPs of a block.
  """

  horizon: int = 16
  dim: int = 2
  width: int = 64
  num_layers: int = 3
  time_width: int = 32
  channel_width: int = 128

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "TemporalConfig":
    """Reads a parsed config.json; ValueError unless every size is there and at least 1."""
    names = [field.name for field in dataclasses.fields(cls)]
    for name in names:
      if not isinstance(config.get(name), int) or config[name] < 1:
        raise ValueError(
          f"denoiser/config.json: expected {name} of at least 1, found {config.get(name)!r}"
        )
    return cls(**{name: config[name] for name in names})


class TemporalMixer(nn.Module):
  """Predicts what it was trained for, say a velocity, from noisy plans, time and condition.

  It computes in the dtype of `x_t`; norms and the sinusoids are float32.
  """

  config: TemporalConfig

  @nn.compact
  def __call__(self, x_t: Array, t: Array, cond: Array) -> Array:
    """`[B, H, A]`.

    Args:
      x_t: `[B, H, A]` noisy plans.
      t: `[B]` in [0, 1000].
      cond: `[B, C]`, of any width.
    """
    config = self.config
    raw = embeddings.timestep_embedding(t, config.width, flip_sin_to_cos=False, freq_shift=0)
    raw = jnp.concatenate([raw.astype(x_t.dtype), cond.astype(x_t.dtype)], axis=-1)
    embedding = jax.nn.silu(embeddings.EmbeddingMLP(config.width, name="embedding")(raw))
    # Each way point sees the condition at once, or the first block would know of none.
    every = jnp.broadcast_to(cond[:, None].astype(x_t.dtype), (*x_t.shape[:2], cond.shape[-1]))
    x = layers.Dense(config.width, name="input")(jnp.concatenate([x_t, every], axis=-1))
    for i in range(config.num_layers):
      x = MixerBlock(config, name=f"layers_{i}")(x, embedding)
    return layers.Dense(config.dim, name="output")(layers.LayerNorm(name="output_norm")(x))


class MixerBlock(nn.Module):
  """One residual MLP along time and one along channels."""

  config: TemporalConfig

  @nn.compact
  def __call__(self, x: Array, embedding: Array) -> Array:  # [B, H, W], [B, W] -> [B, H, W]
    config = self.config
    modulation = layers.Dense(4 * config.width, name="modulation")(embedding)
    scale_1, shift_1, scale_2, shift_2 = jnp.split(modulation[:, None], 4, axis=-1)
    y = layers.LayerNorm(name="norm1")(x) * (1.0 + scale_1) + shift_1
    y = jax.nn.gelu(layers.Dense(config.time_width, name="time_in")(y.swapaxes(1, 2)))
    x = x + layers.Dense(config.horizon, name="time_out")(y).swapaxes(1, 2)
    y = layers.LayerNorm(name="norm2")(x) * (1.0 + scale_2) + shift_2
    y = jax.nn.gelu(layers.Dense(config.channel_width, name="channel_in")(y))
    return x + layers.Dense(config.width, name="channel_out")(y)
