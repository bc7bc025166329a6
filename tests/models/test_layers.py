"""The convolution's own gradient, against JAX's, and in the form that a CPU's loop needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import layers

SHAPES = [  # height, width, kernel, stride, padding
  (8, 8, 3, 1, ((1, 1), (1, 1))),
  (9, 7, 3, 2, ((1, 1), (1, 1))),
  (8, 9, 3, 2, ((0, 1), (0, 1))),  # as diffusers' downsampling pads
  (6, 5, 1, 1, ((0, 0), (0, 0))),
  (7, 8, 4, 3, ((1, 2), (0, 1))),  # the last row and column are in no window
]


def reference(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@pytest.mark.parametrize("height, width, size, stride, padding", SHAPES)
def test_the_gradients_are_those_of_the_plain_convolution(height, width, size, stride, padding):
  x = jax.random.normal(jax.random.key(0), (2, height, width, 3))
  kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))

  def grads(convolve):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(convolve(x, kernel, stride, padding)))

    return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

  for actual, expected in zip(grads(layers.convolve), grads(reference), strict=True):
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
  assert slow_layout not in accumulate(layers.convolve)
