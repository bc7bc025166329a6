"""The MMDiT of Qwen-Image against diffusers' own, on random weights, and its config's errors."""

import dataclasses
import functools
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.networks import qwen_image_transformer

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
import torch_trees  # noqa: E402

BASE = {
  "in_channels": 12,
  "out_channels": 3,
  "num_layers": 2,
  "attention_head_dim": 16,
  "num_attention_heads": 3,
  "joint_attention_dim": 20,
  "axes_dims_rope": [4, 6, 6],
}
NUM_TEXT = 7
# Of each example: padding behind, in front, within and none at all.
MASK = np.array(
  [[int(c) for c in row] for row in ("1110000", "0011111", "1010110", "1111111")], bool
)
# name -> (overrides, size of the target, whether text is masked, sizes of the references)
NETWORKS = {
  "without_padding": ({}, (4, 6), False, []),
  "odd_size": ({"attention_head_dim": 12, "axes_dims_rope": [2, 4, 6]}, (5, 3), True, []),
  "edit": ({}, (3, 4), True, [(2, 9), (5, 1)]),
  "edit_at_zero": ({"zero_cond_t": True}, (3, 5), True, [(4, 2), (1, 8)]),
  "edit_at_zero_without_references": ({"zero_cond_t": True, "num_layers": 1}, (2, 2), True, []),
  "other_patches": (
    {"patch_size": 1, "in_channels": 5, "out_channels": None, "num_layers": 1},
    (1, 6),
    False,
    [(1, 1)],
  ),
}


@functools.cache
def pair(name):
  """(our network, our parameters, the PyTorch model)."""
  oracle = diffusers.QwenImageTransformer2DModel.from_config({**BASE, **NETWORKS[name][0]})
  oracle = torch_trees.randomize(oracle)
  config = qwen_image_transformer.QwenImageConfig.from_dict(json.loads(oracle.to_json_string()))
  network = qwen_image_transformer.QwenImageTransformer2DModel(config)
  return network, {"params": torch_trees.to_tree(oracle.state_dict())}, oracle


def make_inputs(name):
  _, size, masked, sizes = NETWORKS[name]
  config, batch = pair(name)[0].config, len(MASK)
  rng = np.random.default_rng(1)
  shapes = [(batch, *size, config.in_channels) for size in (size, *sizes)]
  x_t, *references = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  text = rng.normal(size=(batch, NUM_TEXT, config.joint_attention_dim)).astype(np.float32)
  t = np.array([937.3, 12.5, 500.0, 1000.0], np.float32)
  return x_t, t, text, MASK if masked else None, tuple(references)


@functools.cache
def outputs(name):
  network, variables, _ = pair(name)
  return np.asarray(jax.jit(network.apply)(variables, *make_inputs(name)))


@pytest.mark.parametrize("name", NETWORKS)
def test_matches_diffusers(name):
  oracle = pair(name)[2]
  x_t, t, text, mask, references = make_inputs(name)
  images = [x_t, *references]
  tokens = [image.reshape(len(image), -1, image.shape[-1]) for image in images]
  with torch.no_grad():
    expected = oracle(
      torch.from_numpy(np.concatenate(tokens, axis=1)),
      torch.from_numpy(text),
      None if mask is None else torch.from_numpy(mask),
      timestep=torch.from_numpy(t / 1000),
      img_shapes=[[(1, *image.shape[1:3]) for image in images]] * len(x_t),
    ).sample
  expected = expected[:, : tokens[0].shape[1]].reshape(*x_t.shape[:3], -1).numpy()
  actual = outputs(name)
  assert actual.shape == expected.shape
  assert expected.std() > 0.1
  # Nearly all of the difference is that diffusers has the frequencies of the time in float32.
  np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_padding_has_no_effect():
  network, variables, _ = pair("edit")
  x_t, t, text, mask, references = make_inputs("edit")
  other = np.where(mask[..., None], text, 100.0).astype(np.float32)
  actual = jax.jit(network.apply)(variables, x_t, t, other, mask, references)
  np.testing.assert_array_equal(actual, outputs("edit"))


def test_how_long_texts_are_padded_has_no_effect():
  network, variables, _ = pair("odd_size")
  x_t, t, text, mask, _ = make_inputs("odd_size")
  longer = [np.pad(x, [(0, 0), (0, 4)] + [(0, 0)] * (x.ndim - 2)) for x in (text, mask)]
  actual = jax.jit(network.apply)(variables, x_t, t, *longer)
  expected = outputs("odd_size")
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["edit", "edit_at_zero"])
def test_one_time_serves_the_batch(name):
  network, variables, _ = pair(name)
  x_t, _, *rest = make_inputs(name)
  one, apply = np.array([250.0], np.float32), jax.jit(network.apply)
  actual = apply(variables, x_t, one, *rest)
  expected = apply(variables, x_t, one.repeat(len(x_t)), *rest)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  # Nothing that depends on the time is computed for each example: a row, and one at zero.
  jaxpr = str(jax.make_jaxpr(network.apply)(variables, x_t, one, *rest))
  rows, width = 1 + network.config.zero_cond_t, 6 * network.config.width
  assert f"f32[{rows},{width}]" in jaxpr
  assert not any(f"f32[{len(x_t) + more},{width}]" in jaxpr for more in (0, 1))


def test_positions_by_hand():
  # Rows of 3 count -2, -1, 0 and columns of 2 count -1, 0; then one row and one of 5 columns.
  found = qwen_image_transformer.positions([(3, 2), (1, 5)], 2)
  target = [[0, row, column] for row in (-2, -1, 0) for column in (-1, 0)]
  reference = [[1, -1, column] for column in (-3, -2, -1, 0, 1)]
  assert found.tolist() == [[2, 2, 2], [3, 3, 3], *target, *reference]


def test_remat_changes_no_gradient():
  network, variables, _ = pair("other_patches")
  inputs = make_inputs("other_patches")

  def gradients(remat):
    again = qwen_image_transformer.QwenImageTransformer2DModel(network.config, remat=remat)
    return jax.jit(jax.grad(lambda v: jnp.sum(again.apply(v, *inputs) ** 2)))(variables)["params"]

  for a, b in zip(*map(jax.tree.leaves, (gradients("full"), gradients("none"))), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-6))


def test_computes_in_bfloat16():
  network, variables, _ = pair("edit_at_zero")
  x_t, *rest = make_inputs("edit_at_zero")
  actual = jax.jit(network.apply)(variables, jnp.asarray(x_t, jnp.bfloat16), *rest)
  assert actual.dtype == jnp.bfloat16
  expected = outputs("edit_at_zero")
  error = np.abs(np.asarray(actual, np.float32) - expected)
  assert 0 < error.max() < 0.05 * np.abs(expected).max()


def test_published_size():
  with torch.device("meta"):
    oracle = diffusers.QwenImageTransformer2DModel()
  # Of any size and no memory: one number, seen through strides of 0.
  stand_ins = {name: torch.zeros(()).expand(p.shape) for name, p in oracle.state_dict().items()}
  expected = jax.tree.map(np.shape, torch_trees.to_tree(stand_ins))
  config = qwen_image_transformer.QwenImageConfig()
  network = qwen_image_transformer.QwenImageTransformer2DModel(config)
  inputs = [(1, 2, 2, 64), (1,), (1, 3, 3584)]
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
  params = jax.eval_shape(network.init, jax.random.key(0), *structs)["params"]
  assert jax.tree.map(np.shape, params) == expected
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 20_430_401_088


def test_config_defaults_are_those_of_diffusers():
  signature = inspect.signature(diffusers.QwenImageTransformer2DModel.__init__).parameters
  defaults = {k: p.default for k, p in signature.items() if p.default is not p.empty}
  config = qwen_image_transformer.QwenImageConfig.from_dict(defaults)
  assert config == qwen_image_transformer.QwenImageConfig()
  again = json.loads(json.dumps(dataclasses.asdict(config)))
  assert hash(qwen_image_transformer.QwenImageConfig.from_dict(again)) == hash(config)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"num_layers": 600}, "num_layers: expected at least 1 and below 512, got 600"),
    ({"in_channels": 0}, "in_channels: expected at least 1"),
    ({"axes_dims_rope": [8, 8]}, r"axes_dims_rope .* 16, .* \(8, 8\)"),
    ({"axes_dims_rope": [4, 6, 8]}, r"axes_dims_rope .* 16, .* \(4, 6, 8\)"),
    ({"axes_dims_rope": [5, 5, 6]}, "axes_dims_rope to be 3 even numbers"),
    ({"axes_dims_rope": [0, 8, 8]}, "axes_dims_rope to be 3 even numbers"),
    ({"guidance_embeds": True}, "guidance_embeds false, found True"),
    ({"use_additional_t_cond": True}, "use_additional_t_cond false, found True"),
    ({"use_layer3d_rope": True}, "use_layer3d_rope false, found True"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=f"transformer config: .*{words}") as error:
    qwen_image_transformer.QwenImageConfig.from_dict({**BASE, **change})
  assert len(str(error.value).splitlines()) == 1
