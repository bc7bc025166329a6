"""Decoding by slices and by tiles, against diffusers and against the plain decoder."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
import torch

from jaxalign.models.families import stable_diffusion
from jaxalign.models.networks import lean_decoding

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return small_models.make("sd1", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "model"
  stable_diffusion.save(model, path)
  return path


def draw(model, *shape):
  return np.random.default_rng(0).standard_normal((*shape, 4), np.float32)


def nchw(x):
  return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


# The tile of the oracle is its sample_size: 16 pixels, 8 latent ones. 12 x 21 leaves tiles of four
# shapes, 8 x 9 a row of two of which the last is three wide.
@pytest.mark.parametrize("size", [(12, 21), (8, 9)], ids=str)
def test_tiles_match_diffusers(size, model, folder):
  vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
  vae.enable_tiling()
  latents = draw(model, 2, *size)
  with torch.no_grad():
    expected = vae.decode(nchw(latents)).sample.permute(0, 2, 3, 1).numpy()
  lean = stable_diffusion.load(folder, decode_tile=8)
  found = jax.jit(lean.vae_decode)(model.params["vae"], latents)
  assert found.shape == (2, 2 * size[0], 2 * size[1], 3)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  whole = jax.jit(model.vae_decode)(model.params["vae"], latents)
  assert np.abs(found - whole).max() > 1e-3


def test_what_fits_a_tile_is_decoded_whole(model):
  calls = []

  def decode_fn(params, z):
    calls.append(z.shape)
    return z

  z = jnp.zeros((1, 8, 6, 3))
  assert lean_decoding.tiled(decode_fn, 8, 1)({}, z) is z
  assert calls == [z.shape]


def test_tiles_of_a_pointwise_decoder_join_without_a_seam():
  """Where tiles agree in their overlap, blending them changes nothing."""
  z = jnp.array(np.random.default_rng(1).normal(size=(2, 23, 11, 3)), jnp.float32)

  def decode_fn(params, z):
    return params * jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)

  found = lean_decoding.tiled(decode_fn, 8, 2)(jnp.float32(3.0), z)
  np.testing.assert_allclose(found, decode_fn(3.0, z), rtol=1e-6)


def test_blending_by_hand():
  before, after = jnp.zeros((1, 4, 1, 1)), jnp.ones((1, 3, 1, 1))
  found = lean_decoding._blended(before, after, 2, axis=1)
  np.testing.assert_array_equal(found[0, :, 0, 0], [0.0, 0.5, 1.0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_slices_change_nothing_but_rounding(batch_size, model, folder):
  lean = stable_diffusion.load(folder, decode_batch=batch_size)
  latents = draw(model, 3, 4, 6)
  found = jax.jit(lean.decode)(model.params["vae"], latents)
  expected = jax.jit(model.decode)(model.params["vae"], latents)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_both_together_have_the_gradient_of_the_plain_decoder():
  z = jnp.array(np.random.default_rng(1).normal(size=(3, 9, 5, 2)), jnp.float32)

  def decode_fn(params, z):
    return params * jnp.sin(z)

  lean = lean_decoding.sliced(lean_decoding.tiled(decode_fn, 4, 1), 2)
  found = jax.jit(jax.grad(lambda z: jnp.sum(jnp.square(lean(2.0, z)))))(z)
  expected = jax.grad(lambda z: jnp.sum(jnp.square(decode_fn(2.0, z))))(z)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_autoencoder_computes_in_float32_whatever_it_is_given(model):
  params, latents = model.params["vae"], draw(model, 1, 4, 4)
  half = jnp.asarray(latents, jnp.bfloat16)
  found = jax.jit(model.decode)(params, half)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
    found, jax.jit(model.decode)(params, half.astype(jnp.float32)), atol=1e-6
  )
  image = jnp.asarray(found, jnp.bfloat16)
  assert all(x.dtype == jnp.float32 for x in jax.jit(model.vae_moments)(params, image))


@pytest.mark.parametrize("tile", [0, 6])
def test_a_tile_has_whole_quarters(tile):
  with pytest.raises(ValueError, match=f"multiple of 4 latent pixels, got {tile}"):
    lean_decoding.tiled(lambda params, z: z, tile, 2)


def test_a_slice_has_an_image():
  with pytest.raises(ValueError, match="at least 1 image, got 0"):
    lean_decoding.sliced(lambda params, z: z, 0)
