"""The T5 encoder against transformers' PyTorch one, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import t5

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

TABLES = ("shared", "embed_tokens", "relative_attention_bias")
XXL = {
  "d_model": 4096,
  "d_kv": 64,
  "d_ff": 10240,
  "num_layers": 24,
  "num_heads": 64,
  "feed_forward_proj": "gated-gelu",
}
LENGTH = 37


def make_config(**kwargs):
  return {
    "vocab_size": 31,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    **kwargs,
  }


CONFIGS = {
  "published_buckets": make_config(),
  # Most pairs of 37 tokens are in ranges, or beyond all.
  "few_buckets": make_config(
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    layer_norm_epsilon=1e-2,
    num_layers=3,
    d_kv=8,
  ),
  "one_layer": make_config(num_layers=1, num_heads=1, d_kv=24),
}


def to_tree(state_dict):
  """The embeddings are stored once, under the name of both that transformers ties to the other."""
  tree = torch_trees.to_tree(state_dict, TABLES)
  tied = tree["encoder"].pop("embed_tokens")["embedding"]
  np.testing.assert_array_equal(tied, tree["shared"]["embedding"])
  return tree


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
  """(our module, our params, the PyTorch model)."""
  oracle = transformers.T5EncoderModel(transformers.T5Config(**CONFIGS[request.param]))
  torch_trees.randomize(oracle)
  model = t5.T5EncoderModel(t5.T5Config.from_dict(oracle.config.to_dict()))
  return model, to_tree(oracle.state_dict()), oracle


def random_ids(length=LENGTH):
  return np.random.default_rng(1).integers(0, 31, (3, length)).astype(np.int32)


def padding(side):
  """A mask of prompts of 37, 20 and 1 tokens."""
  if side == "none":
    return None
  mask = np.arange(LENGTH) < np.array([37, 20, 1])[:, None]
  return mask if side == "right" else mask[:, ::-1].copy()


def encode(model, params, token_ids, mask=None):
  return jax.jit(model.apply)({"params": params}, token_ids, mask)


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_matches_transformers(pair, side):
  model, params, oracle = pair
  token_ids, mask = random_ids(), padding(side)
  with torch.no_grad():
    expected = oracle(
      torch.from_numpy(token_ids).long(),
      attention_mask=None if mask is None else torch.from_numpy(mask).long(),
    ).last_hidden_state.numpy()
  hidden = encode(model, params, token_ids, mask)
  assert hidden.shape == (3, LENGTH, 24)
  assert hidden.dtype == jnp.float32
  assert expected.std() > 0.5
  np.testing.assert_allclose(hidden, expected, rtol=0, atol=2e-5)


def test_one_token(pair):
  model, params, oracle = pair
  token_ids = random_ids(1)
  with torch.no_grad():
    expected = oracle(torch.from_numpy(token_ids).long()).last_hidden_state.numpy()
  np.testing.assert_allclose(encode(model, params, token_ids), expected, rtol=0, atol=2e-5)


def test_padding_changes_nothing_but_itself(pair):
  model, params, _ = pair
  token_ids, mask = random_ids(), padding("right")
  changed = np.where(mask, token_ids, 7)
  before, after = (encode(model, params, ids, mask) for ids in (token_ids, changed))
  np.testing.assert_array_equal(before[mask], after[mask])
  assert np.any(before[~mask] != after[~mask])
  unmasked = encode(model, params, token_ids)
  assert np.all(np.abs(before - unmasked)[1:] > 0, axis=-1).any()


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 20), (32, 32), (7, 3), (4, 2)])
def test_buckets_match_transformers(count, farthest):
  oracle = transformers.models.t5.modeling_t5.T5Attention
  length = 600
  offset = torch.arange(length)[None] - torch.arange(length)[:, None]
  expected = oracle._relative_position_bucket(offset, True, count, farthest)
  np.testing.assert_array_equal(t5.position_buckets(length, count, farthest), expected)


def test_buckets_by_hand():
  # 8 buckets up to 20: distances 0 and 1 alone, then 2 + floor(2 log(d / 2) / log(10)): 3 from 6.3
  # on. Keys to the right are 4 higher; a token itself is 0.
  buckets = t5.position_buckets(9, 8, 20)
  np.testing.assert_array_equal(buckets[0], [0, 5, 6, 6, 6, 6, 6, 7, 7])
  np.testing.assert_array_equal(buckets[8], [3, 3, 2, 2, 2, 2, 2, 1, 0])


def test_computes_in_bfloat16(pair):
  model, params, _ = pair
  token_ids, mask = random_ids(), padding("right")
  exact = encode(model, params, token_ids, mask)
  rounded = encode(t5.T5EncoderModel(model.config, "bfloat16"), params, token_ids, mask)
  assert rounded.dtype == jnp.bfloat16
  difference = np.abs(np.float32(rounded) - exact)
  assert 0 < difference.mean() < 0.02
  # Weights that are stored so say it themselves.
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  assert jax.eval_shape(model.apply, {"params": params}, token_ids).dtype == jnp.bfloat16


def test_names_and_shapes_of_the_published_size():
  with torch.device("meta"):
    oracle = transformers.T5EncoderModel(transformers.T5Config(**XXL))
  hollow = {k: torch.zeros(()).expand(v.shape) for k, v in oracle.state_dict().items()}
  expected = torch_trees.to_tree(hollow, TABLES)
  del expected["encoder"]["embed_tokens"]
  expected = jax.tree.map(np.shape, expected)
  model = t5.T5EncoderModel(t5.T5Config.from_dict(XXL))
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  assert jax.tree.map(lambda leaf: leaf.shape, shapes) == expected
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == sum(p.numel() for p in oracle.parameters()) == 4_762_310_656


def test_config_defaults_are_those_of_transformers():
  published = transformers.T5Config(feed_forward_proj="gated-gelu").to_dict()
  config = t5.T5Config.from_dict(published)
  assert config == t5.T5Config(feed_forward_proj="gated-gelu")
  assert hash(config) == hash(t5.T5Config(feed_forward_proj="gated-gelu"))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"feed_forward_proj": "relu"}, "feed_forward_proj: expected one of gated-gelu, got 'relu'"),
    ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
    ({"model_type": "umt5"}, "model_type: expected one of t5, got 'umt5'"),
    ({"d_kv": 0}, "d_kv: expected at least 1"),
    ({"num_layers": 10**6}, "num_layers"),
    ({"relative_attention_num_buckets": 3}, "num_buckets: expected at least 4"),
    ({"relative_attention_max_distance": 8}, "max_distance: expected at least 9"),
  ],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=words) as error:
    t5.T5Config.from_dict(make_config(**change))
  assert len(str(error.value).splitlines()) == 1


def test_config_that_names_no_feed_forward_is_the_first_t5_and_refused():
  config = make_config()
  del config["feed_forward_proj"]
  with pytest.raises(ValueError, match="feed_forward_proj"):
    t5.T5Config.from_dict(config)
