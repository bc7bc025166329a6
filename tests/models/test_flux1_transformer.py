"""FLUX.1's transformer against diffusers', on random weights, and the errors of its config."""

import dataclasses
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import flux1_transformer, packing

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

BASE = {
  "in_channels": 12,
  "num_layers": 2,
  "num_single_layers": 2,
  "attention_head_dim": 16,
  "num_attention_heads": 3,
  "joint_attention_dim": 10,
  "pooled_projection_dim": 7,
  "axes_dims_rope": [4, 8, 4],
}
# name -> (overrides, (height, width), (height, width) of references)
NETWORKS = {
  "schnell": ({}, (3, 5), []),
  "dev": ({"guidance_embeds": True, "num_attention_heads": 2}, (4, 3), []),
  "kontext": ({"guidance_embeds": True, "num_single_layers": 1}, (2, 3), [(5, 4)]),
  "fill": ({"in_channels": 20, "out_channels": 8, "num_layers": 1}, (1, 7), []),
}
DEV = {"guidance_embeds": True}
TINY = {**BASE, "num_layers": 1, "num_single_layers": 1}


def make_inputs(config, size, sizes=(), batch=2):
  """The arguments of a call, by name; times of which a thousandth is exact in float32."""
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.normal(size=(batch, *shape)).astype(np.float32)

  return {
    "x_t": normal(*size, config.in_channels),
    "t": np.array([937.5, 31.25], np.float32)[:batch],
    "text": normal(5, config.joint_attention_dim),
    "pooled": normal(config.pooled_projection_dim),
    "guidance": np.array([3.5, 1.0], np.float32)[:batch] if config.guidance_embeds else None,
    "references": tuple(normal(*size, config.in_channels) for size in sizes),
  }


def run_torch(oracle, inputs):
  """The prediction of the target's map, called as the pipelines do."""
  maps = [inputs["x_t"], *inputs["references"]]
  ids = [packing.positions(number, x.shape[1:3]) for number, x in enumerate(maps)]
  guidance = inputs["guidance"]
  with torch.no_grad():
    out = oracle(
      hidden_states=torch.cat([torch.from_numpy(x).flatten(1, 2) for x in maps], dim=1),
      encoder_hidden_states=torch.from_numpy(inputs["text"]),
      pooled_projections=torch.from_numpy(inputs["pooled"]),
      timestep=torch.from_numpy(inputs["t"]) / 1000,
      img_ids=torch.from_numpy(np.concatenate(ids)),
      txt_ids=torch.zeros(inputs["text"].shape[1], 3),
      guidance=None if guidance is None else torch.from_numpy(guidance),
    ).sample.numpy()
  batch, height, width = inputs["x_t"].shape[:3]
  return out[:, : height * width].reshape(batch, height, width, -1)


def make_pair(overrides):
  """diffusers' network, ours, and the weights of both."""
  oracle = torch_trees.randomize(diffusers.FluxTransformer2DModel(**{**BASE, **overrides}))
  # What diffusers would write to config.json, with every field of its signature present.
  config = flux1_transformer.FluxConfig.from_dict(json.loads(oracle.to_json_string()))
  params = torch_trees.to_tree(oracle.state_dict())
  return oracle, flux1_transformer.FluxTransformer2DModel(config), params


def apply(network, params, inputs):
  return jax.jit(lambda params, inputs: network.apply({"params": params}, **inputs))(params, inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_matches_diffusers(name):
  overrides, size, sizes = NETWORKS[name]
  oracle, network, params = make_pair(overrides)
  inputs = make_inputs(network.config, size, sizes)
  expected = run_torch(oracle, inputs)
  actual = apply(network, params, inputs)
  assert actual.shape == (2, *size, overrides.get("out_channels", network.config.in_channels))
  assert expected.std() > 0.1
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("overrides", [{}, DEV], ids=["schnell", "dev"])
def test_published_sizes_are_those_of_diffusers(overrides):
  with torch.device("meta"):
    oracle = diffusers.FluxTransformer2DModel(**overrides)
  # A view of one zero: the tree has every name and shape, and takes no memory.
  zero = torch.zeros(())
  state = {name: zero.expand(tensor.shape) for name, tensor in oracle.state_dict().items()}
  expected = jax.tree.map(np.shape, torch_trees.to_tree(state))
  config = flux1_transformer.FluxConfig.from_dict(dict(oracle.config))
  network = flux1_transformer.FluxTransformer2DModel(config)
  inputs = make_inputs(config, (2, 2), batch=1)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **inputs))["params"]
  assert jax.tree.map(jnp.shape, shapes) == expected
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(tensor.numel() for tensor in oracle.parameters())
  assert round(count / 1e9, 2) == (11.90 if overrides else 11.89)


def test_bfloat16_input_gives_bfloat16_output():
  _, network, params = make_pair({**TINY, **DEV})
  inputs = make_inputs(network.config, (3, 4), [(2, 2)])
  expected = apply(network, params, inputs)
  actual = apply(network, params, {**inputs, "x_t": jnp.asarray(inputs["x_t"], jnp.bfloat16)})
  assert actual.dtype == jnp.bfloat16
  error = np.abs(np.asarray(actual, np.float32) - expected)
  assert 0 < error.max() < 0.05 * np.abs(expected).max()


def test_times_of_one_row_are_those_of_the_whole_batch():
  _, network, params = make_pair({**TINY, **DEV})
  inputs = make_inputs(network.config, (2, 3))
  one = {name: inputs[name][:1] for name in ("t", "guidance")}
  whole = {name: np.repeat(row, 2) for name, row in one.items()}
  actual, expected = (apply(network, params, {**inputs, **times}) for times in (one, whole))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_rematerialised_blocks_have_the_same_gradient():
  _, network, params = make_pair(TINY)
  inputs = make_inputs(network.config, (2, 2))

  def gradient(remat):
    network_of = flux1_transformer.FluxTransformer2DModel(network.config, remat)

    def loss(params):
      return jnp.mean(jnp.square(network_of.apply({"params": params}, **inputs)))

    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradient("full"),
    gradient("none"),
  )


def test_the_table_of_rotations_is_in_the_program_once():
  _, network, params = make_pair(BASE)
  inputs = make_inputs(network.config, (3, 5))
  program = jax.jit(lambda inputs: network.apply({"params": params}, **inputs)).lower(inputs)
  # Cosines and sines of 5 + 15 tokens, half of a head's 16 channels.
  found = re.findall(r"stablehlo.constant.*tensor<20x8xf32>", program.as_text())
  assert len(found) == 2


def refused(config, **changes):
  """What a call says whose arguments are changed so; nothing is computed."""
  network = flux1_transformer.FluxTransformer2DModel(config)
  inputs = {**make_inputs(config, (2, 2)), **changes}
  with pytest.raises(ValueError) as error:
    jax.eval_shape(lambda: network.init(jax.random.key(0), **inputs))
  assert len(str(error.value).splitlines()) == 1
  return str(error.value)


def test_calls_that_do_not_fit_the_config_are_refused():
  with_guidance = flux1_transformer.FluxConfig.from_dict({**TINY, **DEV})
  without = flux1_transformer.FluxConfig.from_dict(TINY)
  assert "config: guidance_embeds), got None" in refused(with_guidance, guidance=None)
  assert "guidance_embeds false), got some" in refused(without, guidance=np.ones(2))
  two = make_inputs(without, (2, 2), [(2, 2), (3, 2)])["references"]
  assert "at most one reference image for FLUX.1, got 2" in refused(without, references=two)


def test_config_defaults_are_those_of_diffusers():
  signature = inspect.signature(diffusers.FluxTransformer2DModel.__init__).parameters
  defaults = {name: p.default for name, p in signature.items() if p.default is not p.empty}
  assert dataclasses.asdict(flux1_transformer.FluxConfig()) == defaults


def test_config_is_hashable_and_ignores_bookkeeping():
  first, second = (
    flux1_transformer.FluxConfig.from_dict({"_class_name": "FluxTransformer2DModel", **BASE})
    for _ in range(2)
  )
  assert hash(first) == hash(second)
  assert first.axes_dims_rope == (4, 8, 4)
  assert first.width == 48


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"patch_size": 2}, "expected patch_size 1, .* found 2"),
    ({"num_layers": 0}, "num_layers: expected at least 1"),
    ({"num_single_layers": 1000}, "num_single_layers: expected at least 1 and below 512, got 1000"),
    ({"in_channels": 0}, "in_channels: expected at least 1"),
    ({"out_channels": 0}, "out_channels: expected at least 1"),
    ({"axes_dims_rope": [4, 12]}, r"axes_dims_rope to be 3 even .* 16, .* \(4, 12\)"),
    ({"axes_dims_rope": [3, 9, 4]}, "3 even numbers"),
    ({"axes_dims_rope": [0, 12, 4]}, "3 even numbers"),
    ({"attention_head_dim": 18}, r"add up to 18"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=f"transformer config: .*{words}") as error:
    flux1_transformer.FluxConfig.from_dict({**BASE, **change})
  assert len(str(error.value).splitlines()) == 1
