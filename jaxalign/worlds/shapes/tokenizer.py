"""Writes the tokenizer of the `shapes` model: CLIP's byte-pair format over the grammar's words."""

import collections
import itertools
import os
import pathlib
from collections.abc import Iterable

from jaxalign import files

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def write_tokenizer(folder: str | os.PathLike, words: Iterable[str], *, context_length: int) -> int:
  """Writes vocab.json, merges.txt and their two configs, and returns the vocabulary's size.

  Every byte is in the vocabulary, as in CLIP's own, so any text can be tokenised; the merges make
  each of `words` a single token. The files depend on the set of words alone: a run that is started
  again writes the ids that its embeddings were trained on.

  Args:
    folder: made if it does not exist.
    words: lower-case words of the prompts.
    context_length: tokens of a prompt, start and end included; also the padded length.
  """
  folder = pathlib.Path(folder)
  alphabet = _byte_alphabet()
  merges = _merges(words)
  tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
  tokens += dict.fromkeys(left + right for left, right in merges)
  tokens += [START, END]
  special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}

  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n")
  files.write_json(folder / "special_tokens_map.json", special)
  files.write_json(
    folder / "tokenizer_config.json",
    {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **special},
  )
  return len(tokens)


def _byte_alphabet() -> list[str]:
  """The printable stand-ins of the 256 bytes, sorted."""
  import tokenizers

  return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
  """Byte-pair merges that end with every word in one piece (Sennrich et al. 2016, algorithm 1).

  Ties between equally frequent pairs are broken by the alphabet. The trainer of `tokenizers` breaks
  them by the order of a hash table, which differs from run to run.
  """
  pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
  merges = []
  while any(len(piece) > 1 for piece in pieces):
    counts = collections.Counter(pair for p in pieces for pair in itertools.pairwise(p))
    best = min(counts, key=lambda pair: (-counts[pair], pair))
    merges.append(best)
    pieces = [_merge(piece, best) for piece in pieces]
  return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
  merged: list[str] = []
  for part in piece:
    if merged and (merged[-1], part) == pair:
      merged[-1] += part
    else:
      merged.append(part)
  return merged

