"""AutoencoderKLQwenImage in two dimensions against diffusers' on one frame, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import vae_qwen
from jaxalign.models.weights import safetensors_io

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
distributions = pytest.importorskip("diffusers.models.autoencoders.vae")


def make_config(**kwargs):
  config = {"base_dim": 6, "z_dim": 3, "dim_mult": [1, 2], "num_res_blocks": 1, **kwargs}
  config.setdefault("temperal_downsample", [True] * (len(config["dim_mult"]) - 1))
  config.setdefault("latents_mean", [0.5] * config["z_dim"])
  config.setdefault("latents_std", [2.0] * config["z_dim"])
  return config


# name -> (config, image height, image width)
CONFIGS = {
  "published_levels": (
    make_config(
      dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    ),
    40,
    24,
  ),
  "attention_at_scales": (
    make_config(
      dim_mult=[1, 3, 2],
      num_res_blocks=2,
      attn_scales=[1.0, 0.25],
      temperal_downsample=[True, False],
    ),
    20,
    12,
  ),
  # Upsampling halves 15 channels to 7, and 5 to 2.
  "odd_widths": (
    make_config(
      base_dim=5, z_dim=2, dim_mult=[2, 1, 3], attn_scales=[0.5], temperal_downsample=[False] * 2
    ),
    8,
    28,
  ),
  "one_level": (make_config(dim_mult=[2], input_channels=4), 5, 7),
}


def make_oracle(config):
  oracle = torch_trees.randomize(diffusers.AutoencoderKLQwenImage(**config))
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, parameter in oracle.named_parameters():
      if name.endswith("gamma"):
        parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    # Images are clipped to [-1, 1], which would hide mistakes.
    oracle.decoder.conv_out.weight.mul_(0.2)
  return oracle


def in_two_dimensions(state_dict):
  """The tensors of the 2-D network, by name."""
  rule = {name: vae_qwen.from_file(name, t.numpy()) for name, t in state_dict.items()}
  return {name: tensor for name, tensor in rule.items() if tensor is not None}


def to_params(oracle):
  tensors = in_two_dimensions(oracle.state_dict())
  return torch_trees.to_tree({name: torch.from_numpy(t.copy()) for name, t in tensors.items()})


def as_video(x):  # [B, H, W, C] -> [B, C, 1, H, W]
  return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)[:, :, None]


def posterior_of(oracle, video):
  """What the PyTorch model makes of one frame.

  With its cache of earlier frames the encoder cannot attend at `attn_scales`: a call that
  diffusers' attention does not take. One frame has none before it, so that the cache is not needed.
  """
  with torch.no_grad():
    if not oracle.config.attn_scales:
      return oracle.encode(video).latent_dist
    return distributions.DiagonalGaussianDistribution(oracle.quant_conv(oracle.encoder(video)))


def images_of(config, height, width):
  shape = (2, height, width, config.input_channels)
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
  oracle = make_oracle(config)
  model = vae_qwen.AutoencoderKLQwenImage(vae_qwen.QwenVAEConfig.from_dict(dict(oracle.config)))
  return model, to_params(oracle), oracle, height, width


def test_encode_matches_diffusers_on_one_frame(pair):
  model, params, oracle, height, width = pair
  images = images_of(model.config, height, width)
  encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
  mean, log_var = encode(params, images)
  posterior = posterior_of(oracle, as_video(images))
  downscale = model.config.downscale
  assert mean.shape == (2, height // downscale, width // downscale, model.config.z_dim)
  assert_near(as_video(mean), posterior.mean)
  assert_near(as_video(log_var), posterior.logvar)


def test_decode_matches_diffusers_on_one_frame(pair):
  model, params, oracle, height, width = pair
  downscale = model.config.downscale
  shape = (2, height // downscale, width // downscale, model.config.z_dim)
  latents = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  images = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, latents)
  with torch.no_grad():
    expected = oracle.decode(as_video(latents)).sample
  assert images.shape == (2, height, width, model.config.input_channels)
  assert float((expected.abs() < 1).float().mean()) > 0.5  # the rest is clipped
  assert_near(as_video(images), expected)


def test_reconstruction_is_clipped_and_touches_every_parameter():
  model = vae_qwen.AutoencoderKLQwenImage(vae_qwen.QwenVAEConfig.from_dict(make_config()))
  params = to_params(make_oracle(make_config()))
  params["decoder"]["conv_out"]["bias"] = np.array([9.0, -9.0, 0.0], np.float32)
  images = images_of(model.config, 4, 6)
  decoded = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
  np.testing.assert_array_equal(decoded[..., 0], 1.0)
  np.testing.assert_array_equal(decoded[..., 1], -1.0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_norm_by_hand_and_at_zero():
  # |(3, 4)| = 5: sqrt(2) * (3, 4) / 5 * gamma.
  layer = vae_qwen.ChannelNorm()
  variables = {"params": {"gamma": np.array([1.0, 2.0], np.float32)}}
  x = np.array([3.0, 4.0], np.float32).reshape(1, 1, 1, 2)
  np.testing.assert_allclose(
    layer.apply(variables, x)[0, 0, 0], [2**0.5 * 0.6, 2**0.5 * 1.6], rtol=1e-6
  )
  gradient = jax.grad(lambda x: jnp.sum(layer.apply(variables, x)))(jnp.zeros_like(x))
  assert np.all(np.isfinite(gradient))


def test_normalize_by_hand_and_back():
  config = vae_qwen.QwenVAEConfig(z_dim=2, latents_mean=(1.0, -2.0), latents_std=(2.0, 4.0))
  latents = np.array([[[[5.0, 0.0]]]], np.float32)
  x_0 = vae_qwen.normalize(latents, config)
  np.testing.assert_allclose(x_0, [[[[2.0, 0.5]]]], rtol=1e-6)
  np.testing.assert_allclose(vae_qwen.denormalize(x_0, config), latents, atol=1e-6)
  assert vae_qwen.normalize(latents.astype(jnp.bfloat16), config).dtype == jnp.bfloat16


def test_bfloat16_is_near_float32():
  config, height, width = CONFIGS["published_levels"]
  model = vae_qwen.AutoencoderKLQwenImage(vae_qwen.QwenVAEConfig.from_dict(config))
  params = to_params(make_oracle(config))
  apply = jax.jit(lambda p, x: model.apply({"params": p}, x))
  images = images_of(model.config, height, width)
  exact, narrow = apply(params, images), apply(params, images.astype(jnp.bfloat16))
  assert narrow.dtype == jnp.bfloat16
  difference = np.abs(np.asarray(narrow, np.float32) - exact)
  assert difference.mean() < 0.05 * np.abs(exact).mean()


def test_from_file_keeps_what_one_frame_sees():
  kernel = np.arange(2 * 3 * 3).reshape(2, 1, 3, 3, 1)
  np.testing.assert_array_equal(
    vae_qwen.from_file("encoder.conv_in.weight", kernel), kernel[:, :, 2]
  )
  gamma = np.arange(4.0).reshape(4, 1, 1, 1)
  assert vae_qwen.from_file("encoder.norm_out.gamma", gamma).shape == (4,)
  flat = np.zeros((6, 2, 1, 1))
  assert vae_qwen.from_file("x.attentions.0.to_qkv.weight", flat).shape == flat.shape
  assert vae_qwen.from_file("encoder.down_blocks.2.time_conv.weight", kernel) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_to_file_gives_the_file_back(name):
  read = {n: t.numpy() for n, t in make_oracle(CONFIGS[name][0]).state_dict().items()}
  for name, tensor in read.items():
    again = vae_qwen.to_file(name, vae_qwen.from_file(name, tensor), tensor)
    assert again.dtype == tensor.dtype
    np.testing.assert_array_equal(again, tensor, err_msg=name)


def test_weights_that_changed_reach_the_file():
  config, height, width = CONFIGS["attention_at_scales"]
  read = make_oracle(config)
  other = torch_trees.randomize(diffusers.AutoencoderKLQwenImage(**config), seed=5)
  changed = in_two_dimensions(other.state_dict())
  tensors = {
    name: torch.from_numpy(vae_qwen.to_file(name, changed.get(name), tensor.numpy()))
    for name, tensor in read.state_dict().items()
  }
  written = diffusers.AutoencoderKLQwenImage(**config).eval()
  written.load_state_dict(tensors)
  video = as_video(images_of(vae_qwen.QwenVAEConfig.from_dict(config), height, width))
  assert_near(posterior_of(written, video).mean, posterior_of(other, video).mean)


def test_published_size_has_the_tensors_of_diffusers():
  with torch.device("meta"):
    state = diffusers.AutoencoderKLQwenImage().state_dict()
  # Arrays of any size that take no memory.
  stored = {n: np.broadcast_to(np.float32(0), tuple(t.shape)) for n, t in state.items()}
  left = {n: vae_qwen.from_file(n, t) for n, t in stored.items()}
  expected = {n: t.shape for n, t in left.items() if t is not None}
  model = vae_qwen.AutoencoderKLQwenImage(vae_qwen.QwenVAEConfig())
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  found = safetensors_io.torch_shapes(shapes)
  assert found == expected
  assert sum(t.numel() for t in state.values()) == 126_892_531
  assert {n for n, t in left.items() if t is None} == {n for n in stored if "time_conv" in n}


def test_config_defaults_are_those_of_diffusers():
  with torch.device("meta"):
    config = dict(diffusers.AutoencoderKLQwenImage().config)
  found = vae_qwen.QwenVAEConfig.from_dict(config)
  assert found == vae_qwen.QwenVAEConfig()
  assert hash(found) == hash(vae_qwen.QwenVAEConfig())
  assert found.downscale == 8


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"base_dim": 1}, "base_dim: expected at least 2"),
    ({"z_dim": 0}, "z_dim: expected at least 1"),
    ({"input_channels": 0}, "input_channels: expected at least 1"),
    ({"num_res_blocks": 0}, "num_res_blocks: expected at least 1"),
    ({"dim_mult": []}, "levels of dim_mult: expected at least 1"),
    ({"dim_mult": [1, 0]}, "dim_mult 1: expected at least 1"),
    ({"latents_mean": [0.0]}, r"latents_mean: expected 3 numbers \(z_dim\), found 1"),
    ({"latents_std": [1.0] * 4}, "latents_std: expected 3 numbers"),
    ({"latents_std": [1.0, 0.0, 1.0]}, "latents_std: expected numbers above 0"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=words) as error:
    vae_qwen.QwenVAEConfig.from_dict({**make_config(), **change})
  assert len(str(error.value).splitlines()) == 1
