"""Packing against numbers by hand and the pipelines of diffusers, both orders of channels."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.networks import packing

ORDERS = ["c_dy_dx", "dy_dx_c"]


def latents(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  ("order", "expected"),
  [
    # One 2 x 2 square of two channels, the pixel (dy, dx) of channel c being 100 c + 10 dy + dx.
    ("c_dy_dx", [0, 1, 10, 11, 100, 101, 110, 111]),
    ("dy_dx_c", [0, 100, 1, 101, 10, 110, 11, 111]),
  ],
)
def test_order_of_channels_by_hand(order, expected):
  dy, dx, c = np.indices((2, 2, 2))
  packed = packing.pack((100 * c + 10 * dy + dx)[None], order)
  assert packed.shape == (1, 1, 1, 8)
  np.testing.assert_array_equal(packed[0, 0, 0], expected)


@pytest.mark.parametrize("order", ORDERS)
def test_unpack_is_the_inverse(order):
  x = latents(2, 6, 10, 3)
  packed = packing.pack(x, order)
  assert packed.shape == (2, 3, 5, 12)
  np.testing.assert_array_equal(packing.unpack(packed, order), x)
  np.testing.assert_array_equal(packing.unpack(packing.pack(jnp.asarray(x), order), order), x)
  assert isinstance(packed, np.ndarray)


def test_the_order_of_flux():
  torch = pytest.importorskip("torch")
  pipelines = pytest.importorskip("diffusers.pipelines")
  x = latents(2, 6, 10, 3)
  channels_first = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
  packed = pipelines.FluxPipeline._pack_latents(channels_first, 2, 3, 6, 10)
  np.testing.assert_array_equal(packing.tokens([packing.pack(x, "c_dy_dx")]), packed)
  packed = pipelines.Flux2Pipeline._patchify_latents(channels_first)
  np.testing.assert_array_equal(packing.pack(x, "c_dy_dx"), packed.permute(0, 2, 3, 1))


def test_larger_patches_in_the_order_of_sd3():
  packed = latents(2, 4, 5, 27)
  by_pixel = np.einsum("nhwpqc->nhpwqc", packed.reshape(2, 4, 5, 3, 3, 3)).reshape(2, 12, 15, 3)
  np.testing.assert_array_equal(packing.unpack(packed, "dy_dx_c", 3), by_pixel)
  np.testing.assert_array_equal(packing.pack(by_pixel, "dy_dx_c", 3), packed)


def test_tokens_and_their_positions_by_hand():
  first, second = np.arange(6).reshape(1, 2, 3, 1), 10 + np.arange(2).reshape(1, 2, 1, 1)
  tokens = packing.tokens([first, second])
  np.testing.assert_array_equal(tokens[0, :, 0], [0, 1, 2, 3, 4, 5, 10, 11])
  ids = [[7, 0, 0], [7, 0, 1], [7, 0, 2], [7, 1, 0], [7, 1, 1], [7, 1, 2]]
  np.testing.assert_array_equal(packing.positions(7, (2, 3)), ids)


def test_odd_sides_channels_and_unknown_orders_are_refused():
  with pytest.raises(ValueError, match="multiples of 2, got 3 x 4"):
    packing.pack(latents(1, 3, 4, 2), "c_dy_dx")
  with pytest.raises(ValueError, match="multiples of 2, got 4 x 3"):
    packing.pack(latents(1, 4, 3, 2), "c_dy_dx")
  with pytest.raises(ValueError, match="multiples of 4, got 6"):
    packing.unpack(latents(1, 3, 4, 6), "c_dy_dx")
  for function in (packing.pack, packing.unpack):
    with pytest.raises(ValueError, match="packing: order: expected one of c_dy_dx, dy_dx_c, got"):
      function(latents(1, 2, 2, 4), "dx_dy_c")
