"""Matrix products and convolutions with a weight, and gradients of their own; in reverse mode only.

Each takes the weight as it is stored and perhaps `ready`: the same weight as the product takes it,
cast once outside of a loop (`preparation`). The gradient is the stored weight's. It is summed in
float32 over the batch, whatever the product computes in: where devices share a batch, the sum that
crosses them is taken where the product ends, so that a product in bfloat16 would give eight devices
8 bits of a gradient of which one device has 24.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.distributed import placement
from jaxalign.types import Array

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def _as_used(weight: Array, ready: Array | None, dtype: Any) -> jax.Array:
  """The weight in the dtype of the product, whole on every device.

  It is gathered after it was cast, so that what crosses devices is no wider than it must be.
  """
  return placement.whole(jnp.asarray(weight).astype(dtype) if ready is None else jnp.asarray(ready))


def _wide(x: jax.Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def matmul(x: Array, kernel: Array, ready: Array | None = None) -> jax.Array:
  """`x @ kernel` as one product of two matrices, in the dtype of `x`.

  XLA:CPU takes more than twice as long for the gradient when `x` keeps its leading axes.

  Args:
    x: `[..., D_in]`.
    kernel: `[D_in, D_out]`; the gradient is its own, in its dtype.
    ready: the kernel as it is used, if it was cast before.

  Returns:
    `[..., D_out]`.
  """
  y = _matmul(jnp.asarray(x).reshape(-1, x.shape[-1]), kernel, ready)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _matmul(x, kernel, ready):  # [N, D_in], [D_in, D_out]
  return _product(x, _as_used(kernel, ready, x.dtype))


def _matmul_forward(x, kernel, ready):
  used = _as_used(kernel, ready, x.dtype)
  return _product(x, used), (x, kernel, used, ready)


def _matmul_backward(saved, grad):
  x, kernel, used, ready = saved
  grad_kernel = _kernel_gradient(x, grad).astype(kernel.dtype)
  return _times_transposed(grad, used), grad_kernel, _zeros(ready)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def adapted_matmul(x: Array, merged: Array, a: Array, b: Array, ready: tuple) -> jax.Array:
  """`x @ merged`, where `merged` is a kernel that holds the adapter `a @ b` already.

  Its gradient is that of the side path, `x @ kernel + (x @ a) @ b`, so that of the kernel is never
  formed: da = x^T (g b^T), db = (x a)^T g, dx = g merged^T. Beside the side path it saves two
  products that read and write whole activations for the rank alone; in bfloat16 it rounds the
  adapter off where it is small beside the kernel.

  Args:
    x: `[..., D_in]`.
    merged: `[D_in, D_out]` in the dtype of `x`; no gradient reaches it.
    a, b: `[D_in, r]` and `[r, D_out]`, with gradients in their dtypes.
    ready: `a` and `b` as they are used.
  """
  y = _adapted(jnp.asarray(x).reshape(-1, x.shape[-1]), merged, a, b, ready)
  return y.reshape(*x.shape[:-1], merged.shape[-1])


@jax.custom_vjp
def _adapted(x, merged, a, b, ready):
  return _product(x, placement.whole(merged))


def _adapted_forward(x, merged, a, b, ready):
  merged = placement.whole(merged)
  return _product(x, merged), (x, merged, a, b, ready)


def _adapted_backward(saved, grad):
  x, merged, a, b, ready = saved
  a_used, b_used = (_as_used(w, r, x.dtype) for w, r in zip((a, b), ready, strict=True))
  grad_b = _kernel_gradient(x @ a_used, grad)
  grad_a = _kernel_gradient(x, _times_transposed(grad, b_used))
  grad_x = _times_transposed(grad, merged)
  grads = (grad_a.astype(a.dtype), grad_b.astype(b.dtype))
  return grad_x, jnp.zeros_like(merged), *grads, _zeros(ready)


_adapted.defvjp(_adapted_forward, _adapted_backward)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:  # [N, D], [D, F] -> [N, F]
  """`x @ kernel`, rounded to the dtype of `x`.

  A CPU computes narrow products in float32, and its compiler leaves the rounding out where float32
  goes on: in a rollout, but not in the update, which keeps the result for a gradient.
  """
  if placement.platform() != "cpu" or x.dtype == _wide(x):
    return x @ kernel
  return rounded(jnp.matmul(x, kernel, preferred_element_type=_wide(x)), x.dtype)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
  """`x` in a dtype that may be narrower, with a rounding that no compiler leaves out."""
  info = jnp.finfo(dtype)
  return jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def _times_transposed(grad: jax.Array, kernel: jax.Array) -> jax.Array:  # [N, F], [D, F] -> [N, D]
  return jax.lax.dot_general(grad, kernel, (((1,), (1,)), ((), ())))


def _kernel_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:  # [N, D], [N, F] -> [D, F]
  # In JAX's own order of the two: the other one is slower on a CPU.
  contracted = (((0,), (0,)), ((), ()))
  return jax.lax.dot_general(grad, x, contracted, preferred_element_type=_wide(x)).T


def _zeros(tree: Any) -> Any:
  return jax.tree.map(jnp.zeros_like, tree)


@jax.custom_vjp
def add_bias(y: Array, bias: Array, ready: Array | None = None) -> jax.Array:
  """`y + bias` in the dtype of `y`, `[..., F]`; the gradient of the bias is summed in float32."""
  return y + _as_used(bias, ready, y.dtype)


def _add_bias_forward(y, bias, ready=None):
  return y + _as_used(bias, ready, y.dtype), (bias, ready)


def _add_bias_backward(saved, grad):
  bias, ready = saved
  total = jnp.sum(grad.astype(_wide(grad)), axis=tuple(range(grad.ndim - 1)))
  return grad, total.astype(bias.dtype), _zeros(ready)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
  x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, ready: jax.Array | None = None
) -> jax.Array:
  """`[B, H, W, C_in]` and `[k, k, C_in, C_out]` to `[B, H', W', C_out]`, in the dtype of `x`.

  It has a rule of its own because of its gradients on CPUs, too: see `_input_gradient_on_cpu`.
  """
  return _plain_convolve(x, _as_used(kernel, ready, x.dtype), stride, padding)


def _plain_convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _convolve_forward(x, kernel, stride, padding, ready=None):
  used = _as_used(kernel, ready, x.dtype)
  return _plain_convolve(x, used, stride, padding), (x, kernel, used, ready)


def _convolve_backward(stride, padding, saved, grad):
  x, kernel, used, ready = saved
  sizes = {"stride": stride, "padding": padding}

  def default_x(x, used, grad):
    return jax.vjp(lambda x: _plain_convolve(x, used, stride, padding), x)[1](grad)[0]

  # One choice for each, so that the gradient of a frozen kernel is not computed.
  on_cpu_x = functools.partial(_input_gradient_on_cpu, **sizes)
  on_cpu_kernel = functools.partial(_kernel_gradient_on_cpu, **sizes)
  default_kernel = functools.partial(_kernel_gradient_elsewhere, **sizes)
  grad_x = jax.lax.platform_dependent(x, used, grad, cpu=on_cpu_x, default=default_x)
  grad_kernel = jax.lax.platform_dependent(
    x, used, grad, cpu=on_cpu_kernel, default=default_kernel
  )
  return grad_x, grad_kernel.astype(kernel.dtype), _zeros(ready)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _remaining_padding(x, kernel, grad, stride, padding):
  """Of the input, so that all places of the kernel meet all of the output's gradient."""
  size = kernel.shape[0]
  return [
    (low, size + (out - 1) * stride - length - low)
    for (low, _), length, out in zip(padding, x.shape[1:3], grad.shape[1:3], strict=True)
  ]


def _kernel_gradient_elsewhere(
  x: jax.Array, kernel: jax.Array, grad: jax.Array, *, stride: int, padding: Padding
) -> jax.Array:
  """The gradient of the kernel, `[k, k, C_in, C_out]` in float32: the convolution whose channels
  are the batch.
  """
  return jax.lax.conv_general_dilated(
    x,
    grad,
    (1, 1),
    _remaining_padding(x, kernel, grad, stride, padding),
    rhs_dilation=(stride, stride),
    dimension_numbers=("CHWN", "IHWO", "HWNC"),
    preferred_element_type=_wide(x),
  )


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
  wide = _wide(x)
  result = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0).astype(wide),  # [C_in, H, W, B]: the batch is what is summed over
    grad.transpose(1, 2, 0, 3).astype(wide),  # [H', W', B, C_out]
    (1, 1),
    _remaining_padding(x, kernel, grad, stride, padding),
    rhs_dilation=(stride, stride),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return result.transpose(1, 2, 0, 3)
