"""Layers' own gradients against JAX's, and the forms that other devices than a CPU take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.distributed import placement
from jaxalign.models.networks import layers, products, transformer_2d

SHAPES = [  # height, width, kernel, stride, padding
  (8, 8, 3, 1, ((1, 1), (1, 1))),
  (9, 7, 3, 2, ((1, 1), (1, 1))),
  (8, 9, 3, 2, ((0, 1), (0, 1))),  # as diffusers' downsampling pads
  (6, 5, 1, 1, ((0, 0), (0, 0))),
  (7, 8, 4, 3, ((1, 2), (0, 1))),  # the last row and column are in no window
]


def normal(seed, *shape):
  """By numpy: JAX compiles a program for each shape that it draws."""
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def reference(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@pytest.mark.parametrize("height, width, size, stride, padding", SHAPES)
def test_the_gradients_are_those_of_the_plain_convolution(height, width, size, stride, padding):
  x, kernel = normal(0, 2, height, width, 3), normal(1, size, size, 3, 5)

  def grads(convolve):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(convolve(x, kernel, stride, padding)))

    return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

  for actual, expected in zip(grads(products.convolve), grads(reference), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argument, slow_layout", [(0, "_01oi"), (1, "dim_labels=f01b")])
def test_no_convolution_in_a_loop_has_a_layout_that_is_slow_on_a_cpu(argument, slow_layout):
  """XLA:CPU has fast code for one layout; it brings others into it, but not inside loops."""
  kernel = jnp.ones((3, 3, 4, 6))

  def accumulate(convolve):
    def add(total, x):
      def loss(x, kernel):
        return jnp.sum(jnp.square(convolve(x, kernel, 1, ((1, 1), (1, 1)))))

      return total + jax.grad(loss, argument)(x, kernel), None

    batches = jnp.ones((5, 2, 8, 8, 4))
    start = jnp.zeros_like((batches[0], kernel)[argument])
    compiled = jax.jit(lambda x: jax.lax.scan(add, start, x)[0])
    return compiled.lower(batches).compile().as_text()

  assert slow_layout in accumulate(reference)  # what there is to avoid
  assert slow_layout not in accumulate(products.convolve)


def partial_sums(kernel_shape, function, x):
  """Gradients of the kernel from two halves of a batch, as two devices have them, and from all."""
  kernel = 0.1 * normal(1, *kernel_shape)

  def grad(x):
    return jax.grad(lambda k: jnp.sum(function(x, k).astype(jnp.float32)))(kernel)

  half = len(x) // 2
  return grad(x[:half]), grad(x[half:]), grad(x)


@pytest.mark.parametrize("name, kernel_shape, function", [
  ("matmul", (4, 3), lambda x, k: products.matmul(x.reshape(len(x), -1, 4), k)),
  (
    "convolve",
    (3, 3, 4, 3),
    lambda x, k: products.convolve(x, k, 1, ((1, 1), (1, 1))),
  ),
  ("bias", (4,), products.add_bias),
])
def test_gradients_of_weights_are_summed_in_float32(name, kernel_shape, function):
  """In bfloat16 each part would be rounded to 8 bits before the parts are added."""
  del name
  x = normal(0, 8, 6, 6, 4).astype(jnp.bfloat16)
  first, second, whole = partial_sums(kernel_shape, function, x)
  assert whole.dtype == jnp.float32
  np.testing.assert_allclose(first + second, whole, rtol=1e-5, atol=1e-5)
  rounded = whole.astype(jnp.bfloat16).astype(jnp.float32)
  assert not np.array_equal(rounded, whole) or kernel_shape == (4,)  # a bias's is a count here


@pytest.mark.parametrize("height, width, size, stride, padding", SHAPES)
def test_the_kernels_gradient_on_accelerators_is_the_same(height, width, size, stride, padding):
  x, kernel = normal(0, 2, height, width, 3), normal(1, size, size, 3, 5)
  out, pull = jax.vjp(lambda k: reference(x, k, stride, padding), kernel)
  grad = normal(2, *out.shape)
  elsewhere = products._kernel_gradient_elsewhere(x, kernel, grad, stride=stride, padding=padding)
  np.testing.assert_allclose(elsewhere, pull(grad)[0], rtol=1e-5, atol=1e-5)


def value_and_grads(function, *args):
  def loss(*args):
    return jnp.sum(jnp.sin(function(*args).astype(jnp.float32)))

  return jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)


def assert_close(actual, expected, **bounds):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **bounds), actual, expected)


def test_the_gate_that_keeps_its_projection_alone_has_the_same_gradient():
  projected = 2.0 * normal(0, 3, 5, 14)
  actual = value_and_grads(transformer_2d._lean_gated, projected)
  expected = value_and_grads(transformer_2d._gated, projected)
  assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3])
def test_statistics_in_one_pass_are_those_in_two(mean, monkeypatch):
  """Also where the mean is a thousand stds, which E[x^2] - E[x]^2 does not survive."""
  norm = layers.GroupNorm(num_groups=3, epsilon=1e-6)
  x = mean + normal(0, 2, 5, 7, 6)
  params = {"scale": jnp.linspace(0.5, 2.0, 6), "bias": jnp.linspace(-1.0, 1.0, 6)}

  def apply(params, x):
    return norm.apply({"params": params}, x)

  expected = value_and_grads(apply, params, x)
  monkeypatch.setattr(placement, "platform", lambda: "gpu")
  monkeypatch.setattr(norm.__class__, "_in_two_passes", None)  # it must not be asked
  actual = value_and_grads(apply, params, x)
  bound = 1e-5 if mean < 1e3 else 1e-3  # float32 holds x itself to 6e-5 there
  assert_close(actual, expected, rtol=bound, atol=bound)
