"""Tokenizers of flow transformers that are odd in one way: read as they should be, or refused."""

import json
import shutil
import warnings

import jax
import numpy as np
import odd_flows
import pytest

from jaxalign.models import tokenization

CHATS = ("flux2", "z_image", "qwen_image")  # kinds with a language model


@pytest.fixture
def not_warned(monkeypatch):
  """`not_warned()`: as if no prompt had been cut off in this process."""
  return lambda: monkeypatch.setattr(tokenization, "_truncation_warned", set())


BROKEN = {
  "raises": "{{ raise_exception('only a system message') }}",
  "is no template": "{% for message in messages %}",
  "takes other messages": "{% for part in messages[0].content.parts %}{{ part.text }}{% endfor %}",
  "says much": "{{ raise_exception('why not\\n' * 900) }}",
}


def test_a_language_model_without_its_chat_template_is_refused(copy_flow):
  """Community versions of a Qwen3 often lack it (ostris/ai-toolkit PR#838)."""
  for kind in ("flux2", "z_image"):
    folder = copy_flow(kind)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    words = "tokenizer: expected a tokenizer with its chat template .*found none"
    odd_flows.check_refused(words, folder)


def test_qwen_image_has_its_own_template(copy_flow, sound_flow):
  folder = copy_flow("qwen_image")
  (folder / "tokenizer" / "chat_template.jinja").unlink()
  odd_flows.check_same(folder, sound_flow("qwen_image"))


@pytest.mark.parametrize("how", ["raises", "is no template", "says much"])
def test_a_template_that_fails_is_refused(copy_flow, how):
  folder = copy_flow("z_image")
  (folder / "tokenizer" / "chat_template.jinja").write_text(BROKEN[how])
  odd_flows.check_refused("tokenizer: expected a chat template .*found one that fails", folder)


def test_a_template_that_loses_the_prompt_is_refused(copy_flow):
  """As one of lists of texts and images does, for which a text has no parts."""
  folder = copy_flow("z_image")
  template = "{% for m in messages %}<|im_start|>{% for part in m.content %}{{ part.text }}"
  ends = "{% endfor %}<|im_end|>{% endfor %}"
  (folder / "tokenizer" / "chat_template.jinja").write_text(template + ends)
  message = odd_flows.refusal(lambda: odd_flows.open_model(folder).tokenize(odd_flows.PROMPT))
  assert "tokenizer: expected a chat template" in message, message


@pytest.mark.parametrize("form", ["a text", "a list of templates"])
def test_a_template_in_the_tokenizer_config_is_the_same(copy_flow, sound_flow, form, tmp_path):
  folder = copy_flow("z_image")
  file = folder / "tokenizer" / "chat_template.jinja"
  template = file.read_text()
  file.unlink()
  named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
  form = template if form == "a text" else named
  odd_flows.change(folder / "tokenizer" / "tokenizer_config.json", chat_template=form)
  model = odd_flows.check_same(folder, sound_flow("z_image"))
  model.files.save(odd_flows.read(model), tmp_path / "saved")
  odd_flows.check_same(tmp_path / "saved", sound_flow("z_image"))


def test_a_template_of_its_own_file_is_taken_before_that_of_the_config(copy_flow, sound_flow):
  folder = copy_flow("z_image")
  odd_flows.change(folder / "tokenizer" / "tokenizer_config.json", chat_template="another")
  odd_flows.check_same(folder, sound_flow("z_image"))


def test_a_tokenizer_that_cannot_pad_is_refused(copy_flow):
  folder = copy_flow("z_image")
  odd_flows.drop(folder / "tokenizer" / "tokenizer_config.json", "pad_token")
  odd_flows.check_refused("tokenizer.*pad", folder)


@pytest.mark.parametrize("kind", ["flux1", "flux2"])
def test_a_tokenizer_is_missed_when_the_model_is_opened(copy_flow, kind):
  """Also where there is no empty prompt to guide away from, which is tokenized at once."""
  folder = copy_flow(kind)
  if kind == "flux1":
    odd_flows.change(folder / "transformer" / "config.json", guidance_embeds=False)
  else:
    odd_flows.change(folder / "model_index.json", is_distilled=True)
  shutil.rmtree(folder / "tokenizer")
  odd_flows.check_refused("expected the tokenizer's .*tokenizer", folder, shapes_only=True)


@pytest.mark.parametrize("kind", ["flux1", *CHATS])
def test_a_text_that_is_too_long_loses_its_tail_and_that_is_said_once(sound_flow, kind, not_warned):
  model = odd_flows.open_model(sound_flow(kind))
  lengths = {name: leaf.shape for name, leaf in model.tokenize(odd_flows.PROMPT).items()}
  not_warned()
  long, longer = ([{"prompt": "a cat " * count}] for count in (60, 90))
  with pytest.warns(UserWarning, match=r"a prompt has \d+ tokens, .*reads \d+: the rest is cut"):
    first = model.tokenize(long)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    second = model.tokenize(longer)
  assert {name: leaf.shape for name, leaf in first.items()} == lengths
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_what_each_text_encoder_loses_is_said(sound_flow, not_warned):
  """A CLIP reads little of a prompt, so that its notice says nothing of the T5's."""
  model = odd_flows.open_model(sound_flow("flux1"), text_length=12)
  not_warned()
  with pytest.warns(UserWarning, match="reads 8: the rest is cut off"):
    model.tokenize([{"prompt": "cat " * 7}])  # which the T5 has room for
  with pytest.warns(UserWarning, match="reads 12: the rest is cut off"):
    model.tokenize([{"prompt": "dog " * 30}])


def test_a_tokenizer_with_ids_beyond_the_table_is_refused_in_few_words(copy_flow):
  """A special token that is none of the vocabulary gets a number of its own."""
  folder = copy_flow("qwen_image")
  file = folder / "tokenizer" / "tokenizer_config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "x" * 5000}))
  odd_flows.check_refused("expected ids below 33", folder)
