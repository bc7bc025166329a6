"""The layers every network here is made of: linear maps with a LoRA side path, norms, attention.

A layer finds its adapter in the variable collection "lora". Without that collection the layer is
the base layer, bit for bit, which is why the reference of a LoRA run costs no memory.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.distributed import placement
from jaxalign.models.networks import attention as attention_lib
from jaxalign.models.networks import products
from jaxalign.types import Array

# Leaves of a tree that files hold and that nothing trains: a table of positions.
CONSTANTS = frozenset({"pos_embed"})
MOST = 512  # layers of one kind in a network: each is traced, and many more would take for ever


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
  """A layer's parameter: `module.param(name, init, shape)`, but for what that costs.

  flax traces `init` each time a layer is applied, only to learn its shape: a tenth of the time that
  a network takes to trace.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape)
  value = module.get_variable("params", name)
  if jnp.shape(value) != shape:
    path = "/".join(module.path)
    raise ValueError(f"{path}/{name}: expected an array {shape}, got {jnp.shape(value)}")
  return value


class _Layer(nn.Module):
  """A layer with a kernel, which may find beside it an adapter, and its arrays made ready for use.

  The collection "ready" mirrors the parameters: arrays in the dtype of the computation, made once
  outside of a loop (`preparation`). A kernel in it, beside an adapter, holds that adapter already.
  """

  def _ready(self, name: str) -> Array | None:
    return self.get_variable("ready", name) if self.has_variable("ready", name) else None

  def _adapter(self) -> tuple[Array, Array] | None:
    if not self.has_variable("lora", "a"):
      return None
    return self.get_variable("lora", "a"), self.get_variable("lora", "b")

  def _with_bias(self, y: Array) -> Array:
    bias = parameter(self, "bias", nn.initializers.zeros, (y.shape[-1],))
    return products.add_bias(y, bias, self._ready("bias"))


class Dense(_Layer):
  """`x @ kernel + bias`, plus `(x @ a) @ b` when an adapter is present.

  The side path never forms `a @ b`, so no gradient of the full kernel is formed either
  (Hu et al. 2021, arXiv:2106.09685).
  """

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D_in] -> [..., features]
    kernel_init = nn.initializers.lecun_normal()
    kernel = parameter(self, "kernel", kernel_init, (x.shape[-1], self.features))
    ready, adapter = self._ready("kernel"), self._adapter()
    if adapter is None:
      y = products.matmul(x, kernel, ready)
      return self._with_bias(y) if self.use_bias else y
    used = self._ready("a"), self._ready("b")
    if ready is not None:
      y = products.adapted_matmul(x, ready, *adapter, used)
      return self._with_bias(y) if self.use_bias else y
    y = products.matmul(x, kernel)
    y = self._with_bias(y) if self.use_bias else y
    return y + products.matmul(products.matmul(x, adapter[0], used[0]), adapter[1], used[1])


class Conv(_Layer):
  """2-D convolution, NHWC, kernel `[k, k, C_in, C_out]`; LoRA as k x k to rank, then 1 x 1.

  `padding` is symmetric when an int, else ((top, bottom), (left, right)).
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: int | products.Padding = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, H, W, C_in] -> [B, H', W', features]
    k = self.kernel_size
    kernel_init = nn.initializers.lecun_normal()
    kernel = parameter(self, "kernel", kernel_init, (k, k, x.shape[-1], self.features))
    y = self._with_bias(self._convolve(x, kernel, self._ready("kernel")))
    adapter = self._adapter()
    if adapter is not None:
      (a, b), (a_used, b_used) = adapter, (self._ready("a"), self._ready("b"))
      y = y + products.matmul(self._convolve(x, a, a_used), b, b_used)
    return y

  def _convolve(self, x: Array, kernel: Array, ready: Array | None) -> Array:
    if self.kernel_size == 1 and self.stride == 1 and self.padding == 0:
      # A product is faster than a 1 x 1 convolution everywhere.
      return products.matmul(x, kernel[0, 0], None if ready is None else ready[0, 0])
    padding = self.padding
    if isinstance(padding, int):
      padding = ((padding, padding), (padding, padding))
    return products.convolve(jnp.asarray(x), jnp.asarray(kernel), self.stride, padding, ready)


class GroupNorm(nn.Module):
  """Group normalisation over space and the channels of each group, statistics in float32."""

  num_groups: int
  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, ..., C]
    channels = x.shape[-1]
    scale = parameter(self, "scale", nn.initializers.ones, (channels,))
    bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
    x_32 = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)  # [B, HW, C]
    statistics = self._in_two_passes if placement.platform() == "cpu" else self._in_one_pass
    mean, variance = statistics(x_32)
    y = (x_32 - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
    return y.reshape(x.shape).astype(x.dtype)

  def _in_two_passes(self, x: Array) -> tuple[Array, Array]:  # [B, HW, C] -> [B, 1, C] twice
    mean = self._per_channel(jnp.mean(x, axis=1))
    return mean, self._per_channel(jnp.mean(jnp.square(x - mean), axis=1))

  def _in_one_pass(self, x: Array) -> tuple[Array, Array]:  # [B, HW, C] -> [B, 1, C] twice
    """The same, reading a map once, which is what an accelerator takes its time for.

    E[x^2] - E[x]^2 would lose half the digits where |mean| >> std. About a pivot it does not: any
    value of the group is within a few std of its mean.
    """
    pivot = jax.lax.stop_gradient(self._per_channel(x[:, 0]))
    from_pivot = x - pivot
    first = self._per_channel(jnp.mean(from_pivot, axis=1))
    second = self._per_channel(jnp.mean(jnp.square(from_pivot), axis=1))
    return pivot + first, second - jnp.square(first)

  def _per_channel(self, channel_mean: Array) -> Array:  # [B, C] -> [B, 1, C]
    """Averages per-channel means over each group and spreads them over its channels again."""
    batch, channels = channel_mean.shape
    size = channels // self.num_groups
    group_mean = jnp.mean(channel_mean.reshape(batch, self.num_groups, size), axis=-1)
    return jnp.repeat(group_mean, size, axis=-1)[:, None]


def standardized(x: Array, epsilon: float) -> jax.Array:  # [..., D]
  """Layer normalisation without scale and bias, over the last axis; float32 whatever `x` is."""
  x_32 = x.astype(jnp.float32)
  mean = jnp.mean(x_32, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x_32 - mean), axis=-1, keepdims=True)
  return (x_32 - mean) * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, statistics in float32."""

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D]
    scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
    bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
    return (standardized(x, self.epsilon) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over the last axis, in float32 (arXiv:1910.07467, eq. 4)."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D]
    scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
    x_32 = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(x_32), axis=-1, keepdims=True)
    # A CPU would leave this rounding out in a rollout, where it goes on in float32.
    return products.rounded(x_32 * jax.lax.rsqrt(square + self.epsilon) * scale, x.dtype)


class Embed(nn.Module):
  """A table of `num_embeddings` rows, looked up by index."""

  num_embeddings: int
  features: int

  @nn.compact
  def __call__(self, indices: Array) -> Array:  # [...] int -> [..., features]
    init = nn.initializers.normal(0.02)
    table = parameter(self, "embedding", init, (self.num_embeddings, self.features))
    # Numpy, as read from a file, refuses traced indices.
    return placement.whole(jnp.asarray(table))[indices]


def attention(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
  """Scaled dot-product attention over heads, the one place where its implementation is chosen.

  - On an NVIDIA GPU cuDNN's, where it takes the dtype and the head size (`attention.cudnn_takes`).
  - On a CPU `attention.on_cpu`, some heads at a time.
  - Elsewhere `attention.in_pieces`: in float32, and in the autoencoder with its one head of 512.

  Softmax is float32. Masks of T x N come with texts, which are short: but for cuDNN, with such a
  mask it is the plain form. A mask of keys alone (padding) is `in_pieces`, on a CPU too.

  Args:
    query: `[B, T, H, D]`.
    key, value: `[B, N, H, D]`.
    mask: bool, broadcastable to `[B, H, T, N]`, of rank 4; True where attention is allowed. With
      one row for all T, it is one of keys; each example has some that are attended to.

  Returns:
    `[B, T, H * D]`.
  """
  # Cut alike: a kernel that is called on each device's part takes no other.
  query, key, value = (placement.cut(jnp.asarray(x)) for x in (query, key, value))
  platforms = {"cpu": attention_lib.on_cpu, "default": attention_lib.in_pieces}
  if mask is not None:
    of_keys = mask.shape[2] == 1
    masked = attention_lib.in_pieces if of_keys else attention_lib.plain
    platforms = {"default": functools.partial(masked, mask=mask)}
  # JAX asks for cuDNN while it traces, so that elsewhere this branch must not be there at all.
  if placement.platform() == "gpu" and attention_lib.cudnn_takes(query):
    platforms["cuda"] = functools.partial(attention_lib.cudnn, mask=mask)
  out = jax.lax.platform_dependent(query, key, value, **platforms)
  return out.reshape(*out.shape[:2], -1)
