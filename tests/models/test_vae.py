"""AutoencoderKL against the PyTorch one of diffusers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.networks import vae
from jaxalign.models.weights import safetensors_io

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)


def make_config(widths, **kwargs):
  return {
    "block_out_channels": list(widths),
    "down_block_types": ["DownEncoderBlock2D"] * len(widths),
    "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    **kwargs,
  }


# (config, image height, image width)
CONFIGS = {
  "two_levels": (make_config([8, 16], norm_num_groups=4), 24, 40),
  "three_levels_two_layers": (
    make_config([8, 8, 12], norm_num_groups=2, layers_per_block=2, latent_channels=3),
    20,
    12,
  ),
  "no_quant_conv_shifted": (
    make_config(
      [12, 6],
      norm_num_groups=3,
      latent_channels=5,
      use_quant_conv=False,
      use_post_quant_conv=False,
      shift_factor=0.1159,
      scaling_factor=0.3611,
    ),
    14,
    18,
  ),
  "no_mid_attention": (
    make_config([8, 8], norm_num_groups=8, mid_block_add_attention=False),
    10,
    6,
  ),
  "one_level": (make_config([6], norm_num_groups=1, use_post_quant_conv=False), 5, 7),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
  """(our module, our params, the PyTorch model, image height, image width)."""
  config, height, width = CONFIGS[request.param]
  torch.manual_seed(0)
  oracle = diffusers.AutoencoderKL(**config).eval()
  with torch.no_grad():
    for parameter in oracle.parameters():
      # Biases and norm scales start at 0 and 1, which would hide a swap of them.
      parameter.add_(0.1 * torch.randn_like(parameter))
  folder = tmp_path_factory.mktemp(request.param)
  oracle.save_pretrained(folder)
  model = vae.AutoencoderKL(vae.VAEConfig.from_dict(dict(oracle.config)))
  images = jnp.zeros((1, height, width, 3))
  expected = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  return model, safetensors_io.read_component(folder, expected), oracle, height, width


def to_torch(x):
  return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def test_encode_matches_diffusers(pair):
  model, params, oracle, height, width = pair
  images = np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
  mean, log_var = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(
    params, images
  )
  with torch.no_grad():
    posterior = oracle.encode(to_torch(images)).latent_dist
  np.testing.assert_allclose(to_torch(mean), posterior.mean, atol=1e-4, rtol=0)
  np.testing.assert_allclose(to_torch(log_var), posterior.logvar, atol=1e-4, rtol=0)


def test_decode_matches_diffusers(pair):
  model, params, oracle, height, width = pair
  scale = model.config.downscale
  shape = (2, height // scale, width // scale, model.config.latent_channels)
  latents = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  images = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, latents)
  with torch.no_grad():
    expected = oracle.decode(to_torch(latents)).sample
  np.testing.assert_allclose(to_torch(images), expected, atol=1e-4, rtol=0)


def test_log_var_is_clamped_and_mean_is_not():
  config = make_config([4], norm_num_groups=1, latent_channels=2, use_quant_conv=False)
  config["mid_block_add_attention"] = False
  model = vae.AutoencoderKL(vae.VAEConfig.from_dict(config))
  images = jnp.zeros((1, 3, 3, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  params["encoder"]["conv_out"]["bias"] = jnp.array(
    [100.0, -100.0, 100.0, -100.0]
  )  # two means, two log-variances
  encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
  mean, log_var = encode(params, images)
  np.testing.assert_array_equal(mean[0, 0, 0], [100.0, -100.0])
  np.testing.assert_array_equal(log_var[0, 0, 0], [20.0, -30.0])


def test_downsample_pads_below_and_right():
  # A 3 x 3 kernel of ones counts the pixels under the window: the first window is inside the image,
  # the last sees the padding. Symmetric padding would give the mirror image.
  layer = vae.Downsample(1)
  params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
  counts = layer.apply({"params": params}, jnp.ones((1, 4, 4, 1)))
  np.testing.assert_array_equal(counts[0, :, :, 0], [[9.0, 6.0], [6.0, 4.0]])


def test_call_initialises_every_parameter():
  config = vae.VAEConfig.from_dict(make_config([4, 8], norm_num_groups=2))
  init = vae.AutoencoderKL(config).init
  params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
  assert set(params) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}


def test_config_is_hashable_and_ignores_bookkeeping():
  config = make_config(
    [8, 16], norm_num_groups=4, sample_size=[24, 40], _class_name="AutoencoderKL"
  )
  first, second = vae.VAEConfig.from_dict(config), vae.VAEConfig.from_dict(config)
  assert hash(first) == hash(second)
  assert first.sample_size == (24, 40)
  assert first.downscale == 2


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "AttnDownEncoderBlock2D"),
    ({"up_block_types": ["UpDecoderBlock2D"]}, "make them equal"),
    ({"act_fn": "mish"}, "mish"),
    ({"norm_num_groups": 5}, "norm_num_groups 5"),
    ({"latents_mean": [-1.6, 2.3, 3.6, 0.2]}, "latents_mean null"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    vae.VAEConfig.from_dict({**make_config([8, 16], norm_num_groups=4), **change})
