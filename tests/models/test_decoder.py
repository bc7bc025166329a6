"""The language models as encoders against transformers' PyTorch ones, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SIZES = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3}
# A small base of the frequencies turns all channels within a few tokens.
SOURCES = {
  "qwen3": {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
  },
  "mistral": {
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},
  },
  "mistral_without_head_dim": {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},
  },
  "qwen2_5_vl_text": {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [1, 1, 1]},
  },
}
KINDS = {
  "qwen3": (transformers.models.qwen3, "Qwen3"),
  "mistral": (transformers.models.mistral, "Mistral"),
  "qwen2_5_vl_text": (transformers.models.qwen2_5_vl, "Qwen2_5_VLText"),
}
# What the folders of Z-Image and klein, FLUX.2-dev, and Qwen-Image hold.
PUBLISHED = {
  "qwen3": {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
  },
  "mistral": {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
  },
  "qwen2_5_vl_text": {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
  },
}
LENGTH = 19


def kind_of(name):
  return next(kind for kind in KINDS if name.startswith(kind))


def torch_classes(name):
  folder, prefix = KINDS[kind_of(name)]
  return getattr(folder, f"{prefix}Config"), getattr(folder, f"{prefix}Model")


@pytest.fixture(scope="module", params=SOURCES)
def pair(request):
  """(our config, our params, the PyTorch model)."""
  config_class, model_class = torch_classes(request.param)
  oracle = model_class(config_class(**SIZES, **SOURCES[request.param]))
  torch_trees.randomize(oracle)
  config = decoder.DecoderConfig.from_dict(json.loads(oracle.config.to_json_string()))
  return config, torch_trees.to_tree(oracle.state_dict(), ("embed_tokens",)), oracle


def random_ids():
  return np.random.default_rng(1).integers(0, 31, (3, LENGTH)).astype(np.int32)


def padding(side):
  """A mask of prompts of 19, 11 and 1 tokens."""
  if side == "none":
    return None
  mask = np.arange(LENGTH) < np.array([19, 11, 1])[:, None]
  return mask if side == "right" else mask[:, ::-1].copy()


def encode(config, depths, params, token_ids, mask=None, dtype=None):
  model = decoder.DecoderModel(config, depths, dtype)
  return jax.jit(model.apply)({"params": params}, token_ids, mask)


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_matches_transformers(pair, side):
  config, params, oracle = pair
  token_ids, mask = random_ids(), padding(side)
  with torch.no_grad():
    expected = oracle(
      torch.from_numpy(token_ids).long(),
      attention_mask=None if mask is None else torch.from_numpy(mask).long(),
      output_hidden_states=True,
      use_cache=False,
    )
  states = encode(config, (0, 1, 2, 3), params, token_ids, mask)
  assert len(states) == len(expected.hidden_states) == 4
  for state, wanted in zip(states, expected.hidden_states, strict=True):
    assert state.dtype == jnp.float32
    scale = float(wanted.std())
    assert scale > 0.1
    # Every row: image models read those of padding as well.
    np.testing.assert_allclose(state, wanted, rtol=0, atol=2e-5 * scale)
  np.testing.assert_array_equal(expected.last_hidden_state, expected.hidden_states[-1])


def test_padding_side_does_not_matter_to_the_prompt(pair):
  config, params, _ = pair
  token_ids = random_ids()
  right = encode(config, (3,), params, token_ids, padding("right"))[0]
  lengths = padding("right").sum(axis=1)
  turned = np.stack([np.roll(row, -n) for row, n in zip(token_ids, lengths, strict=True)])
  left = encode(config, (3,), params, turned, padding("left"))[0]
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(left[row, LENGTH - n :], right[row, :n], rtol=0, atol=1e-4)


def test_depths_are_returned_as_asked_and_nothing_past_them_is_built(pair):
  config, params, _ = pair
  token_ids = random_ids()
  every = encode(config, (0, 1, 2, 3), params, token_ids)
  second, embedding = encode(config, (2, 0), params, token_ids)
  np.testing.assert_allclose(second, every[2], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(embedding, every[0])
  built = {depth: {"embed_tokens", *(f"layers_{i}" for i in range(depth))} for depth in range(4)}
  built[3].add("norm")
  for depth, names in built.items():
    model = decoder.DecoderModel(config, (depth,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), token_ids)["params"]
    assert set(shapes) == names
    assert set(names) <= set(params)


@pytest.mark.parametrize("depths", [(), (4,), (1, -1)])
def test_depths_out_of_range_are_refused(pair, depths):
  model = decoder.DecoderModel(pair[0], depths)
  with pytest.raises(ValueError, match=r"depths: expected some from 0 to 3 \(num_hidden_layers\)"):
    jax.eval_shape(model.init, jax.random.key(0), random_ids())


def test_computes_in_bfloat16(pair):
  config, params, _ = pair
  token_ids, mask = random_ids(), padding("left")
  exact = encode(config, (1, 3), params, token_ids, mask)
  rounded = encode(config, (1, 3), params, token_ids, mask, dtype="bfloat16")
  for state, wanted in zip(rounded, exact, strict=True):
    assert state.dtype == jnp.bfloat16
    assert 0 < np.abs(np.float32(state) - wanted).mean() < 0.03 * np.std(wanted)
  # Weights that are stored so say it themselves.
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  model = decoder.DecoderModel(config, (1,))
  assert jax.eval_shape(model.apply, {"params": params}, token_ids)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(name):
  config_class, model_class = torch_classes(name)
  source = config_class(**PUBLISHED[name])
  with torch.device("meta"):
    oracle = model_class(source)
  hollow = {k: torch.zeros(()).expand(v.shape) for k, v in oracle.state_dict().items()}
  expected = jax.tree.map(np.shape, torch_trees.to_tree(hollow, ("embed_tokens",)))
  config = decoder.DecoderConfig.from_dict(source.to_dict())
  model = decoder.DecoderModel(config, (config.num_hidden_layers,))
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  assert jax.tree.map(lambda leaf: leaf.shape, shapes) == expected
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(p.numel() for p in oracle.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_config_defaults_are_those_of_transformers(name):
  source = torch_classes(name)[0]().to_dict()
  silent = {"model_type": name, "sliding_window": None}
  config = decoder.DecoderConfig.from_dict(silent)
  assert config == decoder.DecoderConfig.from_dict({**source, "sliding_window": None})
  assert config.qk_norm == (name == "qwen3")
  assert config.qkv_bias == (name == "qwen2_5_vl_text")
  assert hash(config) == hash(decoder.DecoderConfig.from_dict(silent))


OLDER = {
  "qwen3": {"rope_theta": 50.0, "rope_scaling": None, "sliding_window": None},
  "mistral": {"rope_theta": 20, "sliding_window": None},
  # As first published, flat, and as transformers 4.52 and later wrote it.
  "qwen2_5_vl_text": {
    "model_type": "qwen2_5_vl",
    "rope_theta": 30.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vision_config": {"hidden_size": 1280},
  },
}


@pytest.mark.parametrize("name", OLDER)
def test_older_spellings_and_nested_configs_are_the_same(name):
  newer = {**SIZES, **SOURCES[name], "model_type": name}
  older = {"model_type": name, **SIZES, **SOURCES[name], **OLDER[name]}
  del older["rope_parameters"]
  both = {"rope_scaling": {"type": "default", "rope_type": "default"}}
  nested = {"model_type": "of_both", "hidden_size": 7, "text_config": newer}
  config = decoder.DecoderConfig.from_dict(newer)
  for spelling in (older, {**older, **both}, nested):
    assert decoder.DecoderConfig.from_dict(spelling) == config
  assert decoder.DecoderConfig.from_dict({**newer, "num_key_value_heads": None}) == (
    decoder.DecoderConfig.from_dict({**newer, "num_key_value_heads": newer["num_attention_heads"]})
  )


@pytest.mark.parametrize(
  ("name", "change", "words"),
  [
    ("qwen3", {"model_type": "gemma2"}, "model_type: expected one of qwen3, .*got 'gemma2'"),
    ("qwen3", {"model_type": None}, "model_type: expected one of qwen3"),
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', .*found 'gelu'"),
    ("qwen3", {"attention_bias": True}, "attention_bias: expected False, .*found True"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window: expected False"),
    ("mistral", {"sliding_window": 4096}, "sliding_window: expected None, .*found 4096"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .*'sliding"),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
    ("mistral", {"rope_scaling": {"type": "linear"}}, "rope_scaling.rope_type: .*'linear'"),
    ("mistral", {"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor: .*found 2.0"),
    ("qwen3", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
    ("qwen3", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta: expected at least 1"),
    ("qwen3", {"head_dim": 7}, "head_dim: expected an even number.*found 7"),
    ("qwen3", {"num_key_value_heads": 4}, "num_attention_heads 6 not divisible"),
    ("mistral_without_head_dim", {"num_attention_heads": 0}, "num_attention_heads: .*at least 1"),
    ("qwen3", {"num_hidden_layers": 10**6}, "num_hidden_layers: expected"),
  ],
)
def test_unsupported_config_is_refused(name, change, words):
  config = {"model_type": kind_of(name), **SIZES, **SOURCES[name], **change}
  with pytest.raises(ValueError, match=words) as error:
    decoder.DecoderConfig.from_dict(config)
  assert len(str(error.value).splitlines()) == 1


def test_mistral_that_names_no_window_has_one_and_is_refused():
  config = {"model_type": "mistral", **SIZES, **SOURCES["mistral"]}
  del config["sliding_window"]
  with pytest.raises(ValueError, match=r"sliding_window: expected None.*4096"):
    decoder.DecoderConfig.from_dict(config)
