"""Writes the tokenizer of the `shapes` model: CLIP's byte-pair format over the grammar's words."""

import json
import pathlib
from collections.abc import Iterable

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def write_tokenizer(folder: pathlib.Path, words: Iterable[str], *, context_length: int) -> int:
  """Writes vocab.json, merges.txt and their two configs, and returns the vocabulary's size.

  Every byte is in the vocabulary, as in CLIP's own, so any text can be tokenised; the merges make
  each of `words` a single token.

  Args:
    folder: made if it does not exist.
    words: lower-case words of the prompts.
    context_length: tokens of a prompt, start and end included; also the padded length.
  """
  import tokenizers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix=END_OF_WORD))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=65536, min_frequency=1, end_of_word_suffix=END_OF_WORD, show_progress=False
  )
  model.train_from_iterator([" ".join(sorted(set(words)))], trainer)
  merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]

  tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
  tokens += list(
    dict.fromkeys(left + right for left, right in merges if left + right not in tokens)
  )
  tokens += [START, END]
  special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}

  folder.mkdir(parents=True, exist_ok=True)
  _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n")
  _write_json(folder / "special_tokens_map.json", special)
  _write_json(
    folder / "tokenizer_config.json",
    {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special},
  )
  return len(tokens)


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
