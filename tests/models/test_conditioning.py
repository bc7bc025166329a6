"""What a UNet is told of prompts; `test_family` compares it with diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from jaxalign.models.families import stable_diffusion
from jaxalign.models.networks import conditioning

PROMPTS = ["a cat", "", "dog"]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
  return small_models.make("xl", tmp_path_factory.mktemp("xl"))


def with_flag(model, zeros):
  """The model with another `force_zeros_for_empty_prompt`."""
  pipeline = {**model.configs["pipeline"], "force_zeros_for_empty_prompt": zeros}
  folders = {name: getattr(model, name) for name in ("tokenizer_folder", "tokenizer_2_folder")}
  other = stable_diffusion.build(**{**model.configs, "pipeline": pipeline}, **folders)
  return other.with_params(model.params)


def encode(model, prompts):
  return jax.jit(model.encode_text)(model.params, model.tokenize(prompts))


def test_one_encoder_gives_its_hidden_states(tmp_path):
  model = small_models.make("sd1", tmp_path)
  cond = encode(model, PROMPTS)
  assert {name: value.shape for name, value in cond.items()} == {"text": (3, 8, 12)}


def test_two_encoders_give_text_pooled_text_and_sizes(xl):
  cond = encode(xl.with_image_size(16, 24), PROMPTS)
  shapes = {name: value.shape for name, value in cond.items()}
  assert shapes == {"text": (3, 8, 12 + 16), "text_embeds": (3, 10), "time_ids": (3, 6)}
  np.testing.assert_array_equal(cond["time_ids"], [[16, 24, 0, 0, 16, 24]] * 3)


def test_each_tokenizer_feeds_its_own_encoder(xl):
  ids = xl.tokenize(PROMPTS)
  assert ids.shape == (3, 2, 8) and ids.dtype == np.int32
  end, first_entry = 59, 0
  assert list(ids[0, 0]) == [58, 28, 55, *[end] * 5]
  assert list(ids[0, 1]) == [58, 28, 55, end, *[first_entry] * 4]
  assert xl.tokenize([]).shape == (0, 2, 8)
  whole = encode(xl, PROMPTS)
  for row, width in enumerate((slice(0, 12), slice(12, 28))):
    changed = ids.copy()
    changed[0, row, 1] = 7
    other = jax.jit(xl.encode_text)(xl.params, changed)
    differs = np.any(np.asarray(other["text"] != whole["text"])[0], axis=0)
    assert differs[width].all() and differs.sum() == differs[width].sum()
    assert np.any(other["text_embeds"][0] != whole["text_embeds"][0]) == (row == 1)


def test_the_empty_prompt_is_zeros_where_the_pipeline_says_so(xl):
  zeros, encoded = (encode(with_flag(xl, flag), PROMPTS) for flag in (True, False))
  for name in ("text", "text_embeds"):
    assert not zeros[name][1].any() and np.all(np.any(encoded[name], axis=-1))
    for row in (0, 2):
      np.testing.assert_allclose(zeros[name][row], encoded[name][row], rtol=1e-6)
  np.testing.assert_array_equal(zeros["time_ids"], encoded["time_ids"])


def test_encoders_of_different_length_are_refused():
  longer = {**small_models.XL["text_encoder_2"], "max_position_embeddings": 9}
  with pytest.raises(ValueError, match="text_encoder == text_encoder_2, found 8 and 9"):
    conditioning.make(small_models.TEXT, longer, zero_empty=True)


def test_a_second_encoder_needs_its_tokenizer(xl):
  with pytest.raises(ValueError, match="together, found only one"):
    stable_diffusion.build(**xl.configs, tokenizer_folder=xl.tokenizer_folder)


def test_a_unet_that_wants_sizes_needs_two_encoders(xl):
  configs = {**small_models.KINDS["sd1"], "unet": {**small_models.XL["unet"]}}
  configs["unet"]["cross_attention_dim"] = 12
  model = stable_diffusion.build(**configs, tokenizer_folder=xl.tokenizer_folder)
  with pytest.raises(ValueError, match=r"text_time.*got \['text'\]"):
    model.init_params(jax.random.key(0))


def test_a_unet_that_reads_an_image_asks_for_it(tmp_path):
  model = small_models.make("pix2pix", tmp_path)
  assert model.latent_shape == (8, 8, 4)
  x_t, t, text = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.zeros((2, 8, 12))
  variables = {"params": model.params["unet"]}
  with pytest.raises(ValueError, match=r"4 of them of an image: .*\(2, 8, 8, 4\), found none"):
    jax.eval_shape(model.denoise, variables, x_t, t, {"text": text})
  wrong = {"text": text, "image": x_t[:1]}
  with pytest.raises(ValueError, match=r"found \(1, 8, 8, 4\)"):
    jax.eval_shape(model.denoise, variables, x_t, t, wrong)
