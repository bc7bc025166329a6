"""The text encoders against transformers' PyTorch ones, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.networks import clip
from jaxalign.models.weights import safetensors_io

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


def make_config(**kwargs):
  return {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "hidden_act": "quick_gelu",
    "bos_token_id": 29,
    "eos_token_id": 30,
    "pad_token_id": 30,
    **kwargs,
  }


CONFIGS = {
  "quick_gelu": make_config(),
  "gelu": make_config(hidden_act="gelu", num_attention_heads=2, layer_norm_eps=1e-3),
  "legacy_eos": make_config(eos_token_id=2, hidden_size=10, num_attention_heads=1),
  "inner_eos": make_config(eos_token_id=7, num_hidden_layers=3, intermediate_size=7),
  "one_layer": make_config(num_hidden_layers=1, hidden_act="gelu", vocab_size=40),
}

TOKEN_IDS = np.array(
  [
    [29, 4, 7, 11, 30, 30, 30, 30, 30],
    [29, 30, 7, 7, 7, 0, 0, 0, 0],
    [29, 2, 1, 12, 15, 16, 17, 7, 30],
    [29, 3, 4, 5, 6, 8, 9, 10, 11],  # no end at all
  ],
  np.int32,
)


CLASSES = {"CLIPTextModel": CONFIGS, "CLIPTextModelWithProjection": ["gelu", "legacy_eos"]}


@pytest.fixture(
  scope="module", params=[(name, config) for name, configs in CLASSES.items() for config in configs]
)
def pair(request, tmp_path_factory):
  """(our module, our params, the PyTorch model)."""
  torch.manual_seed(0)
  name, config = request.param
  config = transformers.CLIPTextConfig(**CONFIGS[config], projection_dim=7)
  oracle = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for parameter in oracle.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  folder = tmp_path_factory.mktemp("oracle")
  oracle.save_pretrained(folder)
  model = getattr(clip, name)(clip.CLIPTextConfig.from_dict(oracle.config.to_dict()))
  expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))["params"]
  return model, safetensors_io.read_component(folder, expected), oracle


@pytest.mark.parametrize("length", [9, 5])
def test_matches_transformers(pair, length):
  model, params, oracle = pair
  token_ids = TOKEN_IDS[:, :length]
  encoded = jax.jit(lambda p, ids: model.apply({"params": p}, ids))(params, token_ids)
  with torch.no_grad():
    expected = oracle(torch.from_numpy(token_ids).long(), output_hidden_states=True)
  pooled = expected.get("text_embeds", expected.get("pooler_output"))
  np.testing.assert_allclose(encoded.hidden, expected.last_hidden_state, atol=1e-4, rtol=0)
  np.testing.assert_allclose(encoded.pooled, pooled, atol=1e-4, rtol=0)
  np.testing.assert_allclose(encoded.penultimate, expected.hidden_states[-2], atol=1e-4, rtol=0)


def test_end_positions_by_hand():
  # Legacy: the largest id. Otherwise: the first 7, or position 0 where there is none.
  np.testing.assert_array_equal(clip.end_positions(TOKEN_IDS, 2), [4, 1, 8, 0])
  np.testing.assert_array_equal(clip.end_positions(TOKEN_IDS, 7), [2, 2, 7, 0])


def test_later_tokens_do_not_change_earlier_states(pair):
  model, params, _ = pair
  changed = TOKEN_IDS.copy()
  changed[:, 5] = 13
  apply = jax.jit(lambda p, ids: model.apply({"params": p}, ids)[0])
  before, after = np.asarray(apply(params, TOKEN_IDS)), np.asarray(apply(params, changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert np.all(np.any(before[:, 5:] != after[:, 5:], axis=-1))


def test_activations_by_hand():
  # x sigmoid(1.702 x) at 1 is 1 / (1 + e^-1.702) = 0.845796; x Phi(x) at 1 is 0.841345.
  np.testing.assert_allclose(clip.quick_gelu(jnp.float32(1.0)), 0.845796, atol=2e-6)
  np.testing.assert_allclose(clip.gelu(jnp.float32(1.0)), 0.841345, atol=2e-6)


def test_too_long_prompt_is_refused():
  model = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(make_config()))
  with pytest.raises(ValueError, match="at most 9 tokens per prompt, found 10"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 10), jnp.int32))


@pytest.mark.parametrize(
  ("change", "words"),
  [({"hidden_act": "relu"}, "relu"), ({"num_attention_heads": 5}, "num_attention_heads 5")],
)
def test_unsupported_config_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    clip.CLIPTextConfig.from_dict(make_config(**change))
