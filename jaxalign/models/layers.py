"""The layers every network here is made of: linear maps with a LoRA side path, norms, attention.

A layer finds its adapter in the variable collection "lora". Without that collection the layer is
the base layer, bit for bit, which is why the reference of a LoRA run costs no memory.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models import attention as attention_lib
from jaxalign.types import Array


class Dense(nn.Module):
  """`x @ kernel + bias`, plus `(x @ a) @ b` when an adapter is present.

  The side path never forms `a @ b`, so no gradient of the full kernel is formed either
  (Hu et al. 2021, arXiv:2106.09685).
  """

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D_in] -> [..., features]
    kernel_init = nn.initializers.lecun_normal()
    kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
    y = matmul(x, kernel)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
    if self.has_variable("lora", "a"):
      a: Array = self.get_variable("lora", "a")
      b: Array = self.get_variable("lora", "b")
      y = y + matmul(matmul(x, a), b)
    return y


def matmul(x: Array, kernel: Array) -> Array:  # [..., D_in], [D_in, D_out] -> [..., D_out]
  """`x @ kernel` as one product of two matrices, in the dtype of `x`.

  XLA:CPU takes more than twice as long for the gradient when `x` keeps its leading axes.
  """
  y = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Conv(nn.Module):
  """2-D convolution, NHWC, kernel `[k, k, C_in, C_out]`; LoRA as k x k to rank, then 1 x 1.

  `padding` is symmetric when an int, else ((top, bottom), (left, right)).
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: int | tuple[tuple[int, int], tuple[int, int]] = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, H, W, C_in] -> [B, H', W', features]
    k = self.kernel_size
    kernel_init = nn.initializers.lecun_normal()
    kernel = self.param("kernel", kernel_init, (k, k, x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    y = self._convolve(x, kernel) + bias.astype(x.dtype)
    if self.has_variable("lora", "a"):
      a: Array = self.get_variable("lora", "a")
      b: Array = self.get_variable("lora", "b")
      y = y + matmul(self._convolve(x, a), b)
    return y

  def _convolve(self, x: Array, kernel: Array) -> Array:
    if self.kernel_size == 1 and self.stride == 1 and self.padding == 0:
      return matmul(x, kernel[0, 0])  # faster than a 1 x 1 convolution everywhere
    padding = self.padding
    if isinstance(padding, int):
      padding = ((padding, padding), (padding, padding))
    return convolve(jnp.asarray(x), jnp.asarray(kernel.astype(x.dtype)), self.stride, padding)


Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  """`[B, H, W, C_in]` and `[k, k, C_in, C_out]` to `[B, H', W', C_out]`; in reverse mode only.

  It has a rule of its own because of its gradients on CPUs, see `_input_gradient_on_cpu`.
  """
  return _plain_convolve(x, kernel, stride, padding)


def _plain_convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _convolve_forward(x, kernel, stride, padding):
  return _plain_convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride, padding, saved, grad):
  x, kernel = saved

  def default_x(x, kernel, grad):
    return jax.vjp(lambda x: _plain_convolve(x, kernel, stride, padding), x)[1](grad)[0]

  def default_kernel(x, kernel, grad):
    return jax.vjp(lambda kernel: _plain_convolve(x, kernel, stride, padding), kernel)[1](grad)[0]

  # One choice for each, so that the gradient of a frozen kernel is not computed.
  sizes = {"stride": stride, "padding": padding}
  on_cpu_x = functools.partial(_input_gradient_on_cpu, **sizes)
  on_cpu_kernel = functools.partial(_kernel_gradient_on_cpu, **sizes)
  return (
    jax.lax.platform_dependent(x, kernel, grad, cpu=on_cpu_x, default=default_x),
    jax.lax.platform_dependent(x, kernel, grad, cpu=on_cpu_kernel, default=default_kernel),
  )


convolve.defvjp(_convolve_forward, _convolve_backward)


# XLA:CPU has fast code for convolutions in one layout. It brings others into it at the top level of
# a program but not inside a loop, and both gradients of JAX's own rule have others: there they were
# measured 15 times (the input's, in the autoencoder) and 50 times (the kernel's) slower. Elsewhere
# that rule is what the compilers know.


def _input_gradient_on_cpu(
  x: jax.Array, kernel: jax.Array, grad: jax.Array, *, stride: int, padding: Padding
) -> jax.Array:
  """The gradient of the input, the kernel turned over explicitly."""
  size = kernel.shape[0]
  turned = []
  for (low, _), length, out in zip(padding, x.shape[1:3], grad.shape[1:3], strict=True):
    before = size - 1 - low
    turned.append((before, length - ((out - 1) * stride + 1) - before + size - 1))
  return jax.lax.conv_general_dilated(
    grad,
    kernel[::-1, ::-1].transpose(0, 1, 3, 2),
    (1, 1),
    turned,
    lhs_dilation=(stride, stride),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _kernel_gradient_on_cpu(
  x: jax.Array, kernel: jax.Array, grad: jax.Array, *, stride: int, padding: Padding
) -> jax.Array:
  """The gradient of the kernel, whose sum over the batch becomes the one over input channels."""
  size = kernel.shape[0]
  remaining = [
    (low, size + (out - 1) * stride - length - low)
    for (low, _), length, out in zip(padding, x.shape[1:3], grad.shape[1:3], strict=True)
  ]
  result = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),  # [C_in, H, W, B]: the batch is what is summed over
    grad.transpose(1, 2, 0, 3),  # [H', W', B, C_out]
    (1, 1),
    remaining,
    rhs_dilation=(stride, stride),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return result.transpose(1, 2, 0, 3)


class GroupNorm(nn.Module):
  """Group normalisation over space and the channels of each group, statistics in float32."""

  num_groups: int
  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, ..., C]
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    x_32 = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)  # [B, HW, C]
    mean = self._per_channel(jnp.mean(x_32, axis=1))
    # Two passes: the one-pass form E[x^2] - E[x]^2 loses half the digits when |mean| >> std.
    variance = self._per_channel(jnp.mean(jnp.square(x_32 - mean), axis=1))
    y = (x_32 - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
    return y.reshape(x.shape).astype(x.dtype)

  def _per_channel(self, channel_mean: Array) -> Array:  # [B, C] -> [B, 1, C]
    """Averages per-channel means over each group and spreads them over its channels again."""
    batch, channels = channel_mean.shape
    size = channels // self.num_groups
    group_mean = jnp.mean(channel_mean.reshape(batch, self.num_groups, size), axis=-1)
    return jnp.repeat(group_mean, size, axis=-1)[:, None]


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, statistics in float32."""

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D]
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x_32 = x.astype(jnp.float32)
    mean = jnp.mean(x_32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x_32 - mean), axis=-1, keepdims=True)
    y = (x_32 - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
    return y.astype(x.dtype)


class Embed(nn.Module):
  """A table of `num_embeddings` rows, looked up by index."""

  num_embeddings: int
  features: int

  @nn.compact
  def __call__(self, indices: Array) -> Array:  # [...] int -> [..., features]
    init = nn.initializers.normal(0.02)
    table = self.param("embedding", init, (self.num_embeddings, self.features))
    return jnp.asarray(table)[indices]  # numpy, as read from a file, refuses traced indices


def attention(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
  """Scaled dot-product attention over heads, the one place where its implementation is chosen.

  - On an NVIDIA GPU cuDNN's, in bfloat16 or float16 and for head sizes that are multiples of 8 up
    to 128: 40 and 80 of Stable Diffusion 1.x, 64 of 2.x and XL. (The third size of 1.x, 160, is
    only met at 256 tokens and fewer, and older GPUs refuse it.)
  - On a CPU `attention.on_cpu`, some heads at a time.
  - Elsewhere `attention.in_pieces`: in float32, and in the autoencoder with its one head of 512.

  Softmax is float32. Masks come with texts, which are short: with a mask it is the plain form.

  Args:
    query: `[B, T, H, D]`.
    key, value: `[B, N, H, D]`.
    mask: bool, broadcastable to `[B, H, T, N]`; True where attention is allowed.

  Returns:
    `[B, T, H * D]`.
  """
  query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
  if mask is not None:
    out = attention_lib.plain(query, key, value, mask)
  else:
    platforms = {"cpu": attention_lib.on_cpu, "default": attention_lib.in_pieces}
    # JAX asks for cuDNN while it traces, so that elsewhere this branch must not be there at all.
    if jax.default_backend() == "gpu" and attention_lib.cudnn_takes(query):
      platforms["cuda"] = attention_lib.cudnn
    out = jax.lax.platform_dependent(query, key, value, **platforms)
  return out.reshape(*out.shape[:2], -1)
