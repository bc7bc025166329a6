"""The tokenizer of the embedded model, read back by the classes that load any CLIP tokenizer."""

import json

import numpy as np
import pytest

from jaxalign.models import tokenization
from jaxalign.worlds.shapes import prompts, tokenizer

LENGTH = 24
PROMPTS = [p.text for p in (*prompts.train_prompts(), *prompts.held_out_prompts())]
WORDS = sorted({word for text in PROMPTS for word in text.split()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "new" / "tokenizer"
  tokenizer.write_tokenizer(path, WORDS, context_length=LENGTH)
  return path


@pytest.fixture(scope="module")
def clip(folder):
  import transformers

  return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def vocabulary(folder):
  return json.loads((folder / "vocab.json").read_text())


def test_every_word_of_the_grammar_is_one_token(clip, vocabulary):
  assert len(WORDS) > 20
  for word in WORDS:
    assert clip(word)["input_ids"][1:-1] == [vocabulary[word + "</w>"]], word


def test_every_prompt_has_as_many_tokens_as_words_and_fits(clip):
  for text, ids in zip(PROMPTS, clip(PROMPTS)["input_ids"], strict=True):
    assert len(ids) == len(text.split()) + 2 <= LENGTH


def test_distinct_prompts_have_distinct_ids(folder):
  ids = tokenization.tokenize(folder, PROMPTS, LENGTH, num_embeddings=1000)
  assert ids.shape == (len(PROMPTS), LENGTH) and ids.dtype == np.int32
  assert len(np.unique(ids, axis=0)) == len(set(PROMPTS))


def test_ids_are_the_vocabulary_without_gaps(tmp_path, vocabulary, clip):
  size = tokenizer.write_tokenizer(tmp_path, WORDS, context_length=LENGTH)
  assert sorted(vocabulary.values()) == list(range(size)) and len(clip) == size
  assert size < 1000  # 256 bytes, the same ending a word, and the words with their parts


def test_the_vocabulary_and_the_merges_survive_a_round_trip(clip, folder, vocabulary, tmp_path):
  assert clip.get_vocab() == vocabulary
  clip.save_pretrained(tmp_path)
  import transformers

  again = transformers.CLIPTokenizer.from_pretrained(tmp_path)
  assert again.get_vocab() == vocabulary
  sample = [*PROMPTS[::50], "unseen words, Ünïcode 7!"]
  assert again(sample)["input_ids"] == clip(sample)["input_ids"]


@pytest.mark.parametrize(
  "text", ["a photograph of an astronaut", "ein Bär, 7 Äpfel!", "赤い円", "🟥", "<html> & \\n", ""]
)
def test_unknown_text_tokenises_into_known_tokens(clip, vocabulary, text):
  ids = clip(text)["input_ids"]
  assert ids[0] == vocabulary["<|startoftext|>"] and ids[-1] == vocabulary["<|endoftext|>"]
  inner = ids[1:-1]
  assert bool(inner) == bool(text)
  assert vocabulary["<|endoftext|>"] not in inner  # which is also the unknown token
  assert "".join(clip.decode(inner).split()) == "".join(text.lower().split())


def test_capitals_and_spacing_do_not_matter(clip):
  assert clip("A  Red\tCircle")["input_ids"] == clip("a red circle")["input_ids"]


def test_special_tokens_and_padding(clip, folder, vocabulary):
  end = vocabulary["<|endoftext|>"]
  assert clip.bos_token_id == vocabulary["<|startoftext|>"]
  assert clip.eos_token_id == clip.pad_token_id == end == len(vocabulary) - 1
  assert clip.model_max_length == LENGTH
  (row,) = tokenization.tokenize(folder, ["a red circle"], LENGTH, num_embeddings=1000)
  assert row[0] == clip.bos_token_id and (row[4:] == end).all() and (row[1:4] < end - 1).all()


def test_writing_again_gives_the_same_files(folder, tmp_path):
  # The order in which words are given does not matter, nor that some come twice.
  tokenizer.write_tokenizer(tmp_path, [*reversed(WORDS), WORDS[0]], context_length=LENGTH)
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
