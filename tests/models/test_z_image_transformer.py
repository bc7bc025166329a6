"""The transformer of Z-Image against diffusers' own, on random weights, and the errors of both."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.networks import z_image_transformer

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
import torch_trees  # noqa: E402

BASE = {
  "in_channels": 3,
  "dim": 32,
  "n_layers": 2,
  "n_refiner_layers": 1,
  "n_heads": 2,
  "n_kv_heads": 2,
  "cap_feat_dim": 12,
  "axes_dims": [4, 6, 6],
  "axes_lens": [130, 9, 11],
}
# name -> (overrides, (height, width), lengths of the captions, what they are padded to)
NETWORKS = {
  # 15 image tokens and 17 learned ones; captions of 32, 32, 64 and 64 with theirs.
  "published": ({}, (6, 10), [5, 32, 33, 64], 64),
  # Neither images nor captions have learned tokens, and there is nothing to mask.
  "nothing_to_fill": ({"n_refiner_layers": 2}, (8, 16), [64, 64], 64),
  # More padding than any caption of the batch needs.
  "padded_for_another_batch": ({"norm_eps": 1e-2}, (18, 2), [1, 40, 31], 96),
  "no_norm_of_heads": (
    {"qk_norm": False, "rope_theta": 20.0, "t_scale": 300.0, "n_heads": 1, "axes_dims": [8, 16, 8]},
    (4, 22),
    [17, 60],
    64,
  ),
  "other_patches": (
    {"all_patch_size": [3], "dim": 48, "n_heads": 3, "n_layers": 1},
    (9, 6),
    [3, 32],
    32,
  ),
}


@functools.cache
def pair(name):
  """(our network, our parameters, the PyTorch model)."""
  source = {**BASE, **NETWORKS[name][0]}
  oracle = diffusers.ZImageTransformer2DModel.from_config(source)
  oracle = torch_trees.randomize(oracle)
  config = z_image_transformer.ZImageConfig.from_dict(json.loads(oracle.to_json_string()))
  network = z_image_transformer.ZImageTransformer2DModel(config)
  return network, {"params": torch_trees.to_tree(oracle.state_dict())}, oracle


def make_inputs(name):
  _, size, length, num_text = NETWORKS[name]
  config, batch = pair(name)[0].config, len(length)
  rng = np.random.default_rng(1)
  x_t = rng.normal(size=(batch, *size, config.in_channels)).astype(np.float32)
  text = rng.normal(size=(batch, num_text, config.cap_feat_dim)).astype(np.float32)
  t = np.array([0.0625, 0.9, 1.0, 0.0], np.float32)[:batch]
  return x_t, t, text, np.array(length, np.int32)


@functools.cache
def outputs(name):
  network, variables, _ = pair(name)
  return np.asarray(jax.jit(network.apply)(variables, *make_inputs(name)))


@pytest.mark.parametrize("name", NETWORKS)
def test_matches_diffusers_on_captions_of_their_own_lengths(name):
  oracle = pair(name)[2]
  x_t, t, text, length = make_inputs(name)
  with torch.no_grad():
    expected = oracle(
      list(torch.from_numpy(x_t).permute(0, 3, 1, 2)[:, :, None]),
      torch.from_numpy(t),
      [torch.from_numpy(row[:n]) for row, n in zip(text, length, strict=True)],
      patch_size=oracle.all_patch_size[0],
    ).sample
  expected = torch.stack(expected)[:, :, 0].permute(0, 2, 3, 1).numpy()
  assert expected.std() > 0.1
  # Nearly all of the difference is that diffusers has the frequencies of the time in float32: it
  # grows with the time, from 2e-6.
  np.testing.assert_allclose(outputs(name), expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_what_follows_a_caption_has_no_effect():
  network, variables, _ = pair("published")
  x_t, t, text, length = make_inputs("published")
  beyond = np.arange(text.shape[1]) >= length[:, None]
  other = np.where(beyond[..., None], 100.0, text).astype(np.float32)
  actual = jax.jit(network.apply)(variables, x_t, t, other, length)
  np.testing.assert_array_equal(actual, outputs("published"))


def test_one_time_serves_the_batch():
  network, variables, _ = pair("published")
  x_t, _, text, length = make_inputs("published")
  one = np.array([0.3], np.float32)
  apply = jax.jit(network.apply)
  actual = apply(variables, x_t, one, text, length)
  expected = apply(variables, x_t, one.repeat(len(x_t)), text, length)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  # Nothing that depends on the time is computed for each example.
  jaxpr = str(jax.make_jaxpr(network.apply)(variables, x_t, one, text, length))
  assert f"f32[1,{4 * network.config.dim}]" in jaxpr
  assert f"f32[{len(x_t)},{4 * network.config.dim}]" not in jaxpr


def test_remat_changes_no_gradient():
  network, variables, _ = pair("other_patches")
  inputs = make_inputs("other_patches")

  def gradients(remat):
    again = z_image_transformer.ZImageTransformer2DModel(network.config, remat=remat)
    return jax.jit(jax.grad(lambda v: jnp.sum(again.apply(v, *inputs) ** 2)))(variables)["params"]

  expected = gradients("none")
  assert all(np.any(expected[name]) for name in ("x_pad_token", "cap_pad_token"))
  for a, b in zip(*map(jax.tree.leaves, (gradients("full"), expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_computes_in_bfloat16():
  network, variables, _ = pair("published")
  x_t, *rest = make_inputs("published")
  actual = jax.jit(network.apply)(variables, jnp.asarray(x_t, jnp.bfloat16), *rest)
  assert actual.dtype == jnp.bfloat16
  error = np.abs(np.asarray(actual, np.float32) - outputs("published"))
  assert 0 < error.max() < 0.05 * np.abs(outputs("published")).max()


def test_times_that_bfloat16_cannot_tell_apart():
  network, variables, _ = pair("other_patches")
  x_t, _, text, length = make_inputs("other_patches")
  x_t, text, length = (np.repeat(x[:1], 2, axis=0) for x in (x_t, text, length))
  t = np.array([0.9373, 0.9374], np.float32)
  out = jax.jit(network.apply)(variables, x_t.astype(jnp.bfloat16), t, text, length)
  assert not np.array_equal(out[0], out[1])


def test_published_size():
  with torch.device("meta"):
    oracle = diffusers.ZImageTransformer2DModel()
  # Of any size and no memory: one number, seen through strides of 0.
  stand_ins = {name: torch.zeros(()).expand(p.shape) for name, p in oracle.state_dict().items()}
  expected = jax.tree.map(np.shape, torch_trees.to_tree(stand_ins))
  config = z_image_transformer.ZImageConfig()
  network = z_image_transformer.ZImageTransformer2DModel(config)
  inputs = [(1, 8, 8, 16), (1,), (1, 32, 2560)]
  length = jax.ShapeDtypeStruct((1,), jnp.int32)
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
  params = jax.eval_shape(network.init, jax.random.key(0), *structs, length)["params"]
  assert jax.tree.map(np.shape, params) == expected
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 6_154_908_736


def test_config_defaults_are_those_of_diffusers():
  signature = inspect.signature(diffusers.ZImageTransformer2DModel.__init__).parameters
  defaults = {k: p.default for k, p in signature.items() if p.default is not p.empty}
  config = z_image_transformer.ZImageConfig.from_dict(defaults)
  assert config == z_image_transformer.ZImageConfig()
  again = json.loads(json.dumps(dataclasses.asdict(config)))
  assert hash(z_image_transformer.ZImageConfig.from_dict(again)) == hash(config)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"n_layers": 0}, "n_layers: expected at least 1"),
    ({"n_refiner_layers": 600}, "n_refiner_layers: expected at least 1 and below 512, got 600"),
    ({"dim": 0}, "dim: expected at least 1"),
    ({"n_heads": 3}, "dim to be a multiple of n_heads, found 32 and 3"),
    ({"axes_dims": [4, 6, 8]}, r"axes_dims to be 3 .* 16, .* \(4, 6, 8\)"),
    ({"axes_dims": [5, 5, 6]}, "axes_dims to be 3 even"),
    ({"axes_dims": [8, 8]}, r"axes_dims to be 3 even .* \(8, 8\)"),
    ({"axes_lens": [64, 9, 0]}, "axes_lens: expected length 3 and entries from 1 on"),
    ({"all_patch_size": [2, 4]}, r"all_patch_size: expected length 1 .* found \(2, 4\)"),
    ({"all_f_patch_size": [2]}, r"all_f_patch_size to be \(1,\), found \[2\]"),
    ({"siglip_feat_dim": 1152}, "siglip_feat_dim to be None, found 1152"),
    ({"norm_eps": 1.0}, "norm_eps: expected at least 0.0 and below 1.0"),
    ({"rope_theta": 0.5}, "rope_theta: expected at least 1.0"),
    ({"t_scale": -1.0}, "t_scale: expected at least 0.0"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=f"transformer config: .*{words}") as error:
    z_image_transformer.ZImageConfig.from_dict({**BASE, **change})
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  ("size", "num_text", "words"),
  [
    ((4, 4), 40, "multiple of 32 tokens, at most 128 .* got 40"),
    ((4, 4), 160, "multiple of 32 tokens, at most 128 .* got 160"),
    ((5, 4), 32, "multiples of 2, at most 18 x 22 .* got 5 x 4"),
    ((20, 4), 32, "got 20 x 4"),
    ((4, 24), 32, "got 4 x 24"),
  ],
)
def test_inputs_without_a_place_are_refused(size, num_text, words):
  network = pair("published")[0]
  inputs = [(1, *size, 3), (1,), (1, num_text, 12)]
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
  length = jax.ShapeDtypeStruct((1,), jnp.int32)
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(network.init, jax.random.key(0), *structs, length)
