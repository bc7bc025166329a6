"""AutoencoderKLFlux2 against diffusers' on random weights; AutoencoderKL as of SD3 and FLUX.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import vae, vae_flux2
from jaxalign.models.weights import safetensors_io

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

COUNTER = "bn.num_batches_tracked"  # of training steps, an integer: no weight


def make_config(widths, **kwargs):
  return {
    "block_out_channels": list(widths),
    "down_block_types": ["DownEncoderBlock2D"] * len(widths),
    "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    **kwargs,
  }


SMALL = make_config([6], norm_num_groups=3, latent_channels=3, layers_per_block=1)
# name -> (config, image height, image width)
CONFIGS = {
  "published_levels": (
    make_config([8, 12, 16, 16], norm_num_groups=4, latent_channels=6),
    48,
    32,
  ),
  "other_decoder_no_quant_convs": (
    make_config(
      [8, 16],
      decoder_block_out_channels=[12, 4],
      norm_num_groups=4,
      latent_channels=5,
      layers_per_block=1,
      use_quant_conv=False,
      use_post_quant_conv=False,
      mid_block_add_attention=False,
      batch_norm_eps=0.5,
      out_channels=4,
    ),
    12,
    20,
  ),
  "one_level": (SMALL, 6, 10),
}


def make_oracle(cls, config):
  oracle = torch_trees.randomize(cls(**config))
  if hasattr(oracle, "bn"):
    generator = torch.Generator().manual_seed(1)
    oracle.bn.running_mean.normal_(generator=generator)
    oracle.bn.running_var.uniform_(0.2, 3.0, generator=generator)
  return oracle


def to_params(oracle):
  state = oracle.state_dict()
  state.pop(COUNTER, None)
  return torch_trees.to_tree(state)


def to_torch(x):
  return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)


def images_of(height, width, channels=3):
  shape = (2, height, width, channels)
  return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def assert_near(actual, expected, tolerance=2e-5):
  """Within `tolerance` of the scale of what is expected."""
  expected = expected.detach().numpy()
  scale = np.abs(expected).max()
  assert scale > 0.1
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
  """(our module, our params, the PyTorch model, image height, image width)."""
  config, height, width = CONFIGS[request.param]
  oracle = make_oracle(diffusers.AutoencoderKLFlux2, config)
  model = vae_flux2.AutoencoderKLFlux2(vae_flux2.Flux2VAEConfig.from_dict(dict(oracle.config)))
  return model, to_params(oracle), oracle, height, width


def test_encode_matches_diffusers(pair):
  model, params, oracle, height, width = pair

  @jax.jit
  def encode(params, images):
    mean, log_var = model.apply({"params": params}, images, method="encode")
    x_0 = model.apply({"params": params}, mean, method="normalize")
    return mean, log_var, vae_flux2.patchify(x_0)

  images = images_of(height, width)
  mean, log_var, x_0 = encode(params, images)
  with torch.no_grad():
    posterior = oracle.encode(to_torch(images)).latent_dist
    # pixel_unshuffle puts the pixels of a patch behind its channels; batch norm is in evaluation.
    expected = oracle.bn(torch.nn.functional.pixel_unshuffle(posterior.mode(), 2))
  downscale = model.config.downscale
  assert x_0.shape == (
    2, height // downscale // 2, width // downscale // 2, model.config.packed_channels
  )
  assert_near(to_torch(mean), posterior.mean)
  assert_near(to_torch(log_var), posterior.logvar)
  assert_near(to_torch(x_0), expected)


def test_decode_matches_diffusers(pair):
  model, params, oracle, height, width = pair
  config = model.config

  @jax.jit
  def decode(params, x_0):
    latents = vae_flux2.unpatchify(x_0)
    latents = model.apply({"params": params}, latents, method="denormalize")
    return model.apply({"params": params}, latents, method="decode")

  side = 2 * config.downscale
  shape = (2, height // side, width // side, config.packed_channels)
  x_0 = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  images = decode(params, x_0)
  with torch.no_grad():
    std = torch.sqrt(oracle.bn.running_var + oracle.config.batch_norm_eps)[:, None, None]
    packed = to_torch(x_0) * std + oracle.bn.running_mean[:, None, None]
    expected = oracle.decode(torch.nn.functional.pixel_shuffle(packed, 2)).sample
  assert images.shape == (2, height, width, config.out_channels)
  assert_near(to_torch(images), expected)


def test_patchify_by_hand():
  # Two channels, 10 y + x and 100 more: pixels from left to right and down, then the next channel.
  y, x = np.mgrid[:2, :4]
  latents = np.stack([10 * y + x, 100 + 10 * y + x], axis=-1)[None].astype(np.float32)
  packed = vae_flux2.patchify(latents)
  expected = [[0, 1, 10, 11, 100, 101, 110, 111], [2, 3, 12, 13, 102, 103, 112, 113]]
  np.testing.assert_array_equal(packed, [[expected]])
  np.testing.assert_array_equal(vae_flux2.unpatchify(packed), latents)
  with pytest.raises(ValueError, match="multiples of 2, got 2 x 3"):
    vae_flux2.patchify(latents[:, :, :3])


def test_normalize_by_hand_and_back():
  # (5 - 1) / sqrt(3 + 1) = 2 and (0 + 2) / sqrt(15 + 1) = 0.5.
  statistics = {"running_mean": np.array([1.0, -2.0]), "running_var": np.array([3.0, 15.0])}
  packed = np.array([[[[5.0, 0.0]]]], np.float32)
  x_0 = vae_flux2.normalize(packed, statistics, 1.0)
  np.testing.assert_allclose(x_0, [[[[2.0, 0.5]]]], rtol=1e-6)
  np.testing.assert_allclose(vae_flux2.denormalize(x_0, statistics, 1.0), packed, atol=1e-6)
  narrow = vae_flux2.normalize(packed.astype(jnp.bfloat16), statistics, 1.0)
  assert narrow.dtype == jnp.bfloat16


def test_statistics_are_constants():
  statistics = {"running_mean": jnp.array([1.0, -2.0]), "running_var": jnp.array([3.0, 15.0])}
  packed = jnp.ones((1, 1, 1, 2))
  for function in (vae_flux2.normalize, vae_flux2.denormalize):
    of_both = jax.grad(lambda x, s, f=function: jnp.sum(f(x, s, 1.0)), argnums=(0, 1))
    of_latents, of_statistics = of_both(packed, statistics)
    assert np.all(of_latents)
    assert not any(np.any(part) for part in of_statistics.values())


def test_bfloat16_is_near_float32():
  config, height, width = CONFIGS["one_level"]
  model = vae_flux2.AutoencoderKLFlux2(vae_flux2.Flux2VAEConfig.from_dict(config))
  params = to_params(make_oracle(diffusers.AutoencoderKLFlux2, config))
  apply = jax.jit(lambda p, x: model.apply({"params": p}, x))
  images = images_of(height, width)
  exact, narrow = apply(params, images), apply(params, images.astype(jnp.bfloat16))
  assert narrow.dtype == jnp.bfloat16
  difference = np.abs(np.asarray(narrow, np.float32) - exact)
  assert difference.mean() < 0.05 * np.abs(exact).mean()


def published_shapes(cls, config):
  """Name -> shape of every tensor of diffusers' module, which allocates none of them."""
  with torch.device("meta"):
    return {name: tuple(t.shape) for name, t in cls(**config).state_dict().items()}


def our_shapes(model, channels=3):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))
  return safetensors_io.torch_shapes(shapes["params"])


def test_published_size_has_the_tensors_of_diffusers():
  expected = published_shapes(diffusers.AutoencoderKLFlux2, {})
  assert expected.pop(COUNTER) == ()
  found = our_shapes(vae_flux2.AutoencoderKLFlux2(vae_flux2.Flux2VAEConfig()))
  assert found == expected
  assert sum(int(np.prod(shape)) for shape in found.values()) == 84_046_115 + 2 * 128  # statistics


def test_config_defaults_are_those_of_diffusers():
  with torch.device("meta"):
    config = dict(diffusers.AutoencoderKLFlux2().config)
  assert vae_flux2.Flux2VAEConfig.from_dict(config) == vae_flux2.Flux2VAEConfig()
  assert hash(vae_flux2.Flux2VAEConfig.from_dict(config)) == hash(vae_flux2.Flux2VAEConfig())
  assert vae_flux2.Flux2VAEConfig().downscale == 8
  assert vae_flux2.Flux2VAEConfig().packed_channels == 128


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
    ({"up_block_types": ["UpDecoderBlock2D"]}, "make them equal"),
    ({"act_fn": "mish"}, "act_fn 'silu', found 'mish'"),
    ({"norm_num_groups": 5}, "norm_num_groups 5"),
    ({"latent_channels": 0}, "latent_channels: expected at least 1"),
    ({"layers_per_block": 10**6}, "layers_per_block: expected at least 1"),
    ({"decoder_block_out_channels": [8]}, "decoder_block_out_channels: expected 2 widths"),
    ({"decoder_block_out_channels": [8, 10]}, r"norm_num_groups 4, found \(8, 10\)"),
    ({"batch_norm_eps": -1e-4}, "batch_norm_eps: expected at least 0"),
    ({"patch_size": [1, 1]}, r"patch_size \[2, 2\], found \(1, 1\)"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=words) as error:
    vae_flux2.Flux2VAEConfig.from_dict({**make_config([8, 16], norm_num_groups=4), **change})
  assert len(str(error.value).splitlines()) == 1


# What vae/config.json of SD3, SD3.5 and FLUX.1 says beside the widths.
SIXTEEN = {
  "latent_channels": 16,
  "layers_per_block": 2,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
  "scaling_factor": 1.5305,
  "shift_factor": 0.0609,
  "latents_mean": None,
  "latents_std": None,
  "mid_block_add_attention": True,
  "force_upcast": True,
  "sample_size": 1024,
}


def test_sixteen_channel_form_of_autoencoder_kl_matches_diffusers():
  config = {**make_config([8, 12, 16, 16], norm_num_groups=4), **SIXTEEN}
  oracle = make_oracle(diffusers.AutoencoderKL, config)
  model = vae.AutoencoderKL(vae.VAEConfig.from_dict(dict(oracle.config)))
  assert (model.config.shift_factor, model.config.scaling_factor) == (0.0609, 1.5305)

  @jax.jit
  def both(params, images):
    variables = {"params": params}
    mean, log_var = model.apply(variables, images, method="encode")
    return mean, log_var, model.apply(variables, mean, method="decode")

  images = images_of(24, 40)
  mean, log_var, decoded = both(to_params(oracle), images)
  with torch.no_grad():
    posterior = oracle.encode(to_torch(images)).latent_dist
    expected = oracle.decode(to_torch(mean)).sample
  assert_near(to_torch(mean), posterior.mean)
  assert_near(to_torch(log_var), posterior.logvar)
  assert_near(to_torch(decoded), expected)


def test_published_sixteen_channel_form_has_the_tensors_of_diffusers():
  config = {**make_config([128, 256, 512, 512]), **SIXTEEN}
  found = our_shapes(vae.AutoencoderKL(vae.VAEConfig.from_dict(config)))
  assert found == published_shapes(diffusers.AutoencoderKL, config)
  assert sum(int(np.prod(shape)) for shape in found.values()) == 83_819_683
