"""FLUX.2's transformer against diffusers', on random weights, and the errors of its config."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import flux2_transformer, modulation

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pipelines = pytest.importorskip("diffusers.pipelines")

BASE = {
  "in_channels": 12,
  "num_layers": 2,
  "num_single_layers": 2,
  "attention_head_dim": 16,
  "num_attention_heads": 3,
  "joint_attention_dim": 10,
  "timestep_guidance_channels": 20,
  "axes_dims_rope": [2, 4, 6, 4],
}
KLEIN = {"guidance_embeds": False}
# name -> (overrides, (height, width), (height, width) of references)
NETWORKS = {
  "dev": ({}, (3, 5), []),
  "klein": ({**KLEIN, "mlp_ratio": 2.6, "rope_theta": 300}, (4, 3), []),
  "references": ({**KLEIN, "out_channels": 8, "num_layers": 1}, (2, 3), [(5, 4), (1, 3)]),
  "reference_dev": ({"num_single_layers": 1}, (1, 7), [(2, 2)]),
}
# name -> (config.json, parameters in billions)
PUBLISHED = {
  "dev": ({}, 32.22),
  "klein-4B": (
    {
      **KLEIN,
      "num_layers": 5,
      "num_single_layers": 20,
      "num_attention_heads": 24,
      "joint_attention_dim": 7680,
    },
    3.88,
  ),
  "klein-9B": (
    {
      **KLEIN,
      "num_layers": 8,
      "num_single_layers": 24,
      "num_attention_heads": 32,
      "joint_attention_dim": 12288,
    },
    9.08,
  ),
}
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
    "guidance": np.array([4.0, 1.0], np.float32)[:batch] if config.guidance_embeds else None,
    "references": tuple(normal(*size, config.in_channels) for size in sizes),
  }


def run_torch(oracle, inputs):
  """The prediction of the target's map, with positions as the pipeline makes them."""
  pipeline = pipelines.Flux2Pipeline
  x_t, *references = (
    torch.from_numpy(x).permute(0, 3, 1, 2) for x in (inputs["x_t"], *inputs["references"])
  )
  ids = [pipeline._prepare_latent_ids(x_t)[0]]
  if references:
    ids.append(pipeline._prepare_image_ids([x[:1] for x in references])[0])
  text, guidance = torch.from_numpy(inputs["text"]), inputs["guidance"]
  with torch.no_grad():
    out = oracle(
      hidden_states=torch.cat([pipeline._pack_latents(x) for x in (x_t, *references)], dim=1),
      encoder_hidden_states=text,
      timestep=torch.from_numpy(inputs["t"]) / 1000,
      img_ids=torch.cat(ids),
      txt_ids=pipeline._prepare_text_ids(text)[0],
      guidance=None if guidance is None else torch.from_numpy(guidance),
    ).sample.numpy()
  batch, height, width = inputs["x_t"].shape[:3]
  return out[:, : height * width].reshape(batch, height, width, -1)


def make_pair(overrides):
  """diffusers' network, ours, and the weights of both."""
  oracle = torch_trees.randomize(diffusers.Flux2Transformer2DModel(**{**BASE, **overrides}))
  # What diffusers would write to config.json, with every field of its signature present.
  config = flux2_transformer.Flux2Config.from_dict(json.loads(oracle.to_json_string()))
  params = torch_trees.to_tree(oracle.state_dict())
  return oracle, flux2_transformer.Flux2Transformer2DModel(config), params


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_diffusers(name):
  overrides, billions = PUBLISHED[name]
  with torch.device("meta"):
    oracle = diffusers.Flux2Transformer2DModel(**overrides)
  # A view of one zero: the tree has every name and shape, and takes no memory.
  zero = torch.zeros(())
  state = {name: zero.expand(tensor.shape) for name, tensor in oracle.state_dict().items()}
  expected = jax.tree.map(np.shape, torch_trees.to_tree(state))
  config = flux2_transformer.Flux2Config.from_dict(dict(oracle.config))
  network = flux2_transformer.Flux2Transformer2DModel(config)
  inputs = make_inputs(config, (2, 2), batch=1)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **inputs))["params"]
  assert jax.tree.map(jnp.shape, shapes) == expected
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(tensor.numel() for tensor in oracle.parameters())
  assert round(count / 1e9, 2) == billions


def is_modulation(module, _):
  return isinstance(module, modulation.AdaLN)


@pytest.mark.parametrize("overrides", [{}, KLEIN], ids=["dev", "klein"])
def test_time_of_one_row_is_that_of_the_whole_batch(overrides):
  """A rollout has one time for all its examples: what depends on it alone is computed once."""
  _, network, params = make_pair({**TINY, **overrides})
  inputs = make_inputs(network.config, (2, 3), [(2, 2)])
  given = {name: inputs[name] for name in ("t", "guidance") if inputs[name] is not None}
  one = {name: rows[:1] for name, rows in given.items()}
  whole = {name: np.repeat(row, 2) for name, row in one.items()}
  actual, expected = (apply(network, params, {**inputs, **times}) for times in (one, whole))
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)

  def modulations():
    kept = {"capture_intermediates": is_modulation, "mutable": "intermediates"}
    return network.apply({"params": params}, **{**inputs, **one}, **kept)[1]

  rows = [leaf.shape[:2] for leaf in jax.tree.leaves(jax.eval_shape(modulations))]
  assert rows == [(1, 1)] * (6 + 6 + 3)


def test_bfloat16_input_gives_bfloat16_output():
  _, network, params = make_pair(TINY)
  inputs = make_inputs(network.config, (3, 4), [(2, 2)])
  expected = apply(network, params, inputs)
  actual = apply(network, params, {**inputs, "x_t": jnp.asarray(inputs["x_t"], jnp.bfloat16)})
  assert actual.dtype == jnp.bfloat16
  error = np.abs(np.asarray(actual, np.float32) - expected)
  assert 0 < error.max() < 0.05 * np.abs(expected).max()


def test_rematerialised_blocks_have_the_same_gradient():
  _, network, params = make_pair(TINY)
  inputs = make_inputs(network.config, (2, 2))

  def gradient(remat):
    network_of = flux2_transformer.Flux2Transformer2DModel(network.config, remat)

    def loss(params):
      return jnp.mean(jnp.square(network_of.apply({"params": params}, **inputs)))

    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradient("full"),
    gradient("none"),
  )


def refused(config, **changes):
  """What a call says whose arguments are changed so; nothing is computed."""
  network = flux2_transformer.Flux2Transformer2DModel(config)
  inputs = {**make_inputs(config, (2, 2)), **changes}
  with pytest.raises(ValueError) as error:
    jax.eval_shape(lambda: network.init(jax.random.key(0), **inputs))
  assert len(str(error.value).splitlines()) == 1
  return str(error.value)


def test_guidance_that_does_not_fit_the_config_is_refused():
  dev = flux2_transformer.Flux2Config.from_dict(TINY)
  klein = flux2_transformer.Flux2Config.from_dict({**TINY, **KLEIN})
  assert "config: guidance_embeds), got None" in refused(dev, guidance=None)
  assert "guidance_embeds false), got some" in refused(klein, guidance=np.ones(2))


def test_config_defaults_are_those_of_diffusers():
  signature = inspect.signature(diffusers.Flux2Transformer2DModel.__init__).parameters
  defaults = {name: p.default for name, p in signature.items() if p.default is not p.empty}
  assert dataclasses.asdict(flux2_transformer.Flux2Config()) == defaults


def test_config_is_hashable_and_ignores_bookkeeping():
  first, second = (
    flux2_transformer.Flux2Config.from_dict({"_class_name": "Flux2Transformer2DModel", **BASE})
    for _ in range(2)
  )
  assert hash(first) == hash(second)
  assert first.axes_dims_rope == (2, 4, 6, 4)
  assert (first.width, first.hidden) == (48, 144)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"patch_size": 2}, "expected patch_size 1, .* found 2"),
    ({"num_layers": 600}, "num_layers: expected at least 1 and below 512, got 600"),
    ({"num_single_layers": 0}, "num_single_layers: expected at least 1"),
    ({"rope_theta": 0}, "rope_theta: expected at least 1"),
    ({"joint_attention_dim": -1}, "joint_attention_dim: expected at least 1"),
    ({"out_channels": 0}, "out_channels: expected at least 1"),
    ({"timestep_guidance_channels": 21}, "timestep_guidance_channels to be even, .* found 21"),
    ({"mlp_ratio": 0.0}, "mlp_ratio times the width: expected at least 1"),
    ({"mlp_ratio": float("inf")}, "mlp_ratio times the width: expected at least 1"),
    ({"axes_dims_rope": [4, 8, 4]}, r"axes_dims_rope to be 4 even .* 16, .* \(4, 8, 4\)"),
    ({"attention_head_dim": 18}, r"add up to 18"),
    ({"eps": 1e-5}, "expected eps 1e-06, found 1e-05"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=f"transformer config: .*{words}") as error:
    flux2_transformer.Flux2Config.from_dict({**BASE, **change})
  assert len(str(error.value).splitlines()) == 1
