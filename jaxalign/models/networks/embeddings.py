"""What a denoiser makes of the time, and of whole prompts: sinusoids and small networks on them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.networks import layers
from jaxalign.types import Array


def timestep_embedding(t: Array, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Array:
  """Sinusoids of the time, in float32: `[sin(t w), cos(t w)]`, halves swapped when flipped.

  `w_i = 10000 ** (-i / (dim / 2 - freq_shift))` (Vaswani et al. 2017, arXiv:1706.03762, 3.5).
  In bfloat16 neighbouring timesteps above 256 would be the same number.

  Args:
    t: `[B]`, integer or float timesteps, usually in [0, 1000).
    dim: even.

  Returns:
    `[B, dim]` float32.
  """
  half = dim // 2
  frequencies = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))
  angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
  parts = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class EmbeddingMLP(nn.Module):
  """Two linear maps around a SiLU, from a raw embedding to the width of the time embedding."""

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, D] -> [B, features]
    x = jax.nn.silu(layers.Dense(self.features, use_bias=self.use_bias, name="linear_1")(x))
    return layers.Dense(self.features, use_bias=self.use_bias, name="linear_2")(x)


class TimeEmbedding(nn.Module):
  """The time, and a guidance scale and the whole prompt where a transformer is told them, added.

  features: D. channels: of the sinusoids.
  """

  features: int
  channels: int = 256
  use_bias: bool = True

  @nn.compact
  def __call__(
    self, t: Array, dtype: Any, guidance: Array | None = None, pooled: Array | None = None
  ) -> Array:
    """`[B, D]` in `dtype`, that of the computation.

    Args:
      t: `[B]` or `[1]` times.
      dtype: of the result.
      guidance: `[B]` or `[1]` guidance scales, as users write them.
      pooled: `[B, P]`, of prompts.
    """
    embedding = self._of_number("timestep_embedder", t, dtype)
    if guidance is not None:
      # In float32, as the time: 1000 times 3.5 is 3504 in bfloat16.
      scaled = 1000.0 * guidance.astype(jnp.float32)
      embedding = embedding + self._of_number("guidance_embedder", scaled, dtype)
    if pooled is not None:
      embedding = embedding + self._mlp("text_embedder")(pooled.astype(dtype))
    return embedding

  def _of_number(self, name: str, number: Array, dtype: Any) -> Array:  # [B] -> [B, D]
    raw = timestep_embedding(number, self.channels, flip_sin_to_cos=True, freq_shift=0)
    return self._mlp(name)(raw.astype(dtype))

  def _mlp(self, name: str) -> EmbeddingMLP:
    return EmbeddingMLP(self.features, self.use_bias, name=name)
