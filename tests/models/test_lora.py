"""Adapters: where they go, that they start as nothing, that merging them changes nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.adapters import lora
from jaxalign.models.networks import layers, unet

KEY = jax.random.key(0)
CONFIG = unet.UNetConfig(
  block_out_channels=(8, 16),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=1,
  cross_attention_dim=12,
  attention_head_dim=2,
  norm_num_groups=4,
)
UNET = unet.UNet2DConditionModel(CONFIG)


def filled(shapes, scale=0.2, seed=0):
  """A tree of normal numbers, norm scales around 1; cheaper than through an initialiser."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    offset = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(rng.normal(offset, scale, leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(1)
  x_t = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
  text = rng.normal(size=(2, 5, 12)).astype(np.float32)
  return x_t, np.array([10, 900]), text


@pytest.fixture(scope="module")
def params(inputs):
  return filled(jax.eval_shape(UNET.init, KEY, *inputs)["params"])


@pytest.fixture(scope="module")
def apply():
  return jax.jit(UNET.apply)


def leaf_paths(tree):
  return ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_default_targets_are_the_attention_projections(params):
  # Transformers: 1 on the way down, 1 in the middle, 2 on the way up (layers_per_block + 1).
  # Each has one block of 2 attentions of 4 projections: 4 * 2 * 4 = 32 layers.
  adapter = lora.init(KEY, params, rank=3, targets=lora.ATTENTION)
  paths = leaf_paths(adapter)
  assert len(paths) == 2 * 32
  assert "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/a" in paths
  leaf = adapter["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]
  assert leaf["a"].shape == (12, 3)  # the text's width
  assert leaf["b"].shape == (3, 16)


def test_regular_expression_selects_linear_and_convolution_layers(params):
  # conv1 and conv2 in the two down levels' single resnets, and nowhere else.
  adapter = lora.init(KEY, params, rank=2, targets=r"^down_blocks_\d/resnets_0/conv[12]$")
  assert len(jax.tree.leaves(adapter)) == 2 * 4
  leaf = adapter["down_blocks_1"]["resnets_0"]["conv1"]
  assert leaf["a"].shape == (3, 3, 8, 2)
  assert leaf["b"].shape == (2, 16)
  # Norms have no kernel: every layer of the network is matched, and no norm is.
  everything = leaf_paths(jax.eval_shape(lambda: lora.init(KEY, params, rank=2, targets="")))
  assert not any("norm" in path for path in everything)
  assert len(everything) == 2 * sum(path.endswith("/kernel") for path in leaf_paths(params))


def test_initial_values(params):
  # Uniform in +-1/sqrt(fan_in): standard deviation 1/sqrt(3 fan_in). fan_in of conv_in: 3*3*4.
  leaf = lora.init(KEY, params, rank=500, targets="^conv_in$")["conv_in"]
  assert np.abs(leaf["a"]).max() <= 1 / 6
  np.testing.assert_allclose(np.std(leaf["a"]), 1 / (6 * np.sqrt(3)), rtol=0.02)
  assert not np.any(leaf["b"])


def test_another_target_does_not_change_the_others(params):
  few = lora.init(KEY, params, rank=2, targets="attn1/to_q$")
  many = lora.init(KEY, params, rank=2, targets="attn./to_[qk]$")
  block = ("mid_block", "attentions_0", "transformer_blocks_0", "attn1")
  for part in block:
    few, many = few[part], many[part]
  np.testing.assert_array_equal(few["to_q"]["a"], many["to_q"]["a"])
  assert not np.array_equal(many["to_q"]["a"], many["to_k"]["a"])


# One target for the tests that run the network, so that it is compiled once for both.
WIDE = r"attn|ff|proj|linear_\d$"


def test_fresh_adapter_is_the_base_network_bitwise(params, inputs, apply):
  adapter = lora.init(KEY, params, rank=2, targets=WIDE)
  base = apply({"params": params}, *inputs)
  adapted = apply({"params": params, "lora": adapter}, *inputs)
  np.testing.assert_array_equal(base, adapted)


def test_side_path_equals_merged_kernels_on_the_unet(params, inputs, apply):
  shapes = jax.eval_shape(lambda: lora.init(KEY, params, rank=2, targets=WIDE))
  adapter = filled(shapes, scale=0.15, seed=3)
  adapted = apply({"params": params, "lora": adapter}, *inputs)
  merged = apply({"params": lora.merge(params, adapter)}, *inputs)
  assert float(jnp.abs(adapted - apply({"params": params}, *inputs)).max()) > 0.1
  np.testing.assert_allclose(adapted, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "layer", [layers.Dense(7), layers.Conv(7, 3, 2, 1), layers.Conv(7, 1, 1, 0)], ids=repr
)
def test_fresh_adapter_is_the_base_layer_bitwise(layer):
  # Layer by layer, without jit: XLA may fuse two programs differently, to one unit in the last
  # place for a convolution, which is no business of the adapter.
  x = jax.random.normal(KEY, (2, 5, 8, 3))
  params = filled(jax.eval_shape(layer.init, KEY, x)["params"])
  adapter = lora.init(KEY, params, rank=2, targets="")
  adapted = layer.apply({"params": params, "lora": adapter}, x)
  np.testing.assert_array_equal(adapted, layer.apply({"params": params}, x))


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 2, 1), (1, 1, 0)])
def test_side_path_equals_merged_kernel_on_a_convolution(kernel_size, stride, padding):
  conv = layers.Conv(7, kernel_size, stride, padding)
  x = jax.random.normal(KEY, (2, 5, 8, 3))
  params = filled(jax.eval_shape(conv.init, KEY, x)["params"])
  adapter = filled(jax.eval_shape(lambda: lora.init(KEY, params, rank=2, targets="")), 1.0, 4)
  adapted = conv.apply({"params": params, "lora": adapter}, x)
  np.testing.assert_allclose(
    adapted, conv.apply({"params": lora.merge(params, adapter)}, x), rtol=0, atol=1e-5
  )


def test_merge_leaves_the_rest_and_the_argument_alone():
  params = {"one": {"kernel": jnp.eye(2), "bias": jnp.ones(2)}, "two": {"scale": jnp.ones(2)}}
  adapter = {"one": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[3.0, 4.0]])}}
  merged = lora.merge(params, adapter)
  np.testing.assert_array_equal(merged["one"]["kernel"], [[4.0, 4.0], [6.0, 9.0]])
  assert merged["one"]["bias"] is params["one"]["bias"]
  assert merged["two"] is params["two"]
  np.testing.assert_array_equal(params["one"]["kernel"], jnp.eye(2))


def test_scaled_acts_linearly_on_the_update():
  params = {"one": {"kernel": jnp.eye(2)}}
  adapter = {"one": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[3.0, 4.0]])}}
  half = lora.merge(params, lora.scaled(adapter, 0.5))["one"]["kernel"]
  np.testing.assert_array_equal(half, [[2.5, 2.0], [3.0, 5.0]])
  none = lora.merge(params, lora.scaled(adapter, 0.0))["one"]["kernel"]
  np.testing.assert_array_equal(none, jnp.eye(2))


class Stack(nn.Module):
  """Square linear layers, wide against the batch so that weight gradients would dominate."""

  depth: int
  width: int

  @nn.compact
  def __call__(self, x):
    for i in range(self.depth):
      x = jnp.tanh(layers.Dense(self.width, name=f"layer_{i}")(x))
    return x


def flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_gradient_of_the_adapter_never_forms_a_full_weight_gradient():
  # Forward 1, backward to the activations 1, adapter small: below 2 forwards plus the adapter.
  # A full weight gradient would cost one forward more, 3 in all.
  stack, x = Stack(8, 256), jnp.ones((32, 256))
  params = filled(jax.eval_shape(stack.init, KEY, x)["params"], 0.05)
  adapter = lora.init(KEY, params, rank=2, targets="layer_")

  def side_path(adapter, params, x):
    return jnp.sum(stack.apply({"params": params, "lora": adapter}, x) ** 2)

  def merged(adapter, params, x):
    return jnp.sum(stack.apply({"params": lora.merge(params, adapter)}, x) ** 2)

  forward = flops(lambda params, x: stack.apply({"params": params}, x), params, x)
  assert flops(jax.value_and_grad(side_path), adapter, params, x) / forward <= 2.0
  assert flops(jax.value_and_grad(merged), adapter, params, x) / forward > 2.5


def test_errors_say_what_to_change(params):
  with pytest.raises(ValueError, match=r"'to_quarry' match none of .* layers, such as: .*conv_in"):
    lora.init(KEY, params, rank=2, targets="to_quarry")
  with pytest.raises(ValueError, match="rank of at least 1, got 0"):
    lora.init(KEY, params, rank=0, targets=lora.ATTENTION)
  with pytest.raises(ValueError, match="'down_blocks_9', which the parameters lack"):
    lora.merge(params, {"down_blocks_9": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}})
