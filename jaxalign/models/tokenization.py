"""Prompts to token ids, with the tokenizer that a model's folder holds."""

import functools
import os
import pathlib
import shutil
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign import checks, files
from jaxalign.types import Record

_FILES = (
  "vocab.json",
  "merges.txt",
  "spiece.model",
  "added_tokens.json",
  "special_tokens_map.json",
  "tokenizer_config.json",
  "tokenizer.json",
  "chat_template.jinja",
  "chat_template.json",
  "processor_config.json",
  "preprocessor_config.json",
)
LANGUAGE_MODEL = "language model"  # a kind of tokenizer, of what is spoken to in a template
# transformers' class of each kind of tokenizer.
_CLASSES = {
  "CLIP": "CLIPTokenizer",
  "T5": "PreTrainedTokenizerFast",
  LANGUAGE_MODEL: "AutoTokenizer",
}
# What files any one of which is a vocabulary.
_VOCABULARIES = {
  "CLIP": ("vocab.json", "tokenizer.json"),
  "T5": ("tokenizer.json",),
  LANGUAGE_MODEL: ("tokenizer.json", "vocab.json"),
}

_truncation_warned: set[int] = set()  # lengths
# Each call of a tokenizer switches its padding and truncation on or off for good, so of two threads
# in it one would get the rows that the other asked for.
_calls = threading.Lock()


def texts(records: Sequence[Record]) -> list[str]:
  """The field "prompt" of each record; ValueError names the first that has none."""
  for number, record in enumerate(records):
    text = record.get("prompt")
    if not isinstance(text, str):
      found = "none" if text is None else repr(text)
      raise ValueError(f'record {number}: expected a text "prompt", found {found}')
  return [record["prompt"] for record in records]


def tokenize(
  folder: str | os.PathLike,
  prompts: Sequence[str],
  context_length: int,
  *,
  num_embeddings: int,
  kind: str = "CLIP",
) -> np.ndarray:  # int32 [B, N]
  """Token ids of each prompt as its text encoder reads them, padded by the tokenizer's own token.

  A longer prompt loses its tail, as it does in diffusers; the first one in a process is reported.
  Safe to call from threads. `kind` is that of the text encoder: "CLIP", "T5" or
  `LANGUAGE_MODEL`.
  Raises ValueError if a CLIP's tokenizer has shorter texts than `context_length`: the text encoder
  would read another number of tokens in diffusers. And for an id beyond the `num_embeddings` of the
  text encoder, which a program would silently take for the last one.
  """
  return tokenize_with_mask(
    folder, prompts, context_length, num_embeddings=num_embeddings, kind=kind
  )[0]


def tokenize_with_mask(
  folder: str | os.PathLike,
  prompts: Sequence[str],
  context_length: int,
  *,
  num_embeddings: int,
  kind: str,
  padding_side: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # int32 [B, N], bool [B, N]
  """`tokenize`, and which tokens are none of padding.

  Padding is "left" or "right" of the tokens, or where the tokenizer has it.
  """
  tokenizer, length = _load(pathlib.Path(folder), kind), context_length
  # diffusers goes by the tokenizer of a CLIP, and by what it is asked for of a T5.
  if kind == "CLIP" and tokenizer.model_max_length < length:
    raise ValueError(
      f"{folder}: expected a tokenizer for texts of {length} tokens, as many as the text encoder "
      f"reads, found model_max_length {tokenizer.model_max_length}\n"
      f"check tokenizer_config.json, or give another tokenizer (--tokenizer)"
    )
  rows = list(prompts)
  if not rows:
    return np.zeros((0, length), np.int32), np.zeros((0, length), bool)
  # A template writes the token of a beginning itself, where there is one.
  start = tokenizer.bos_token if kind == LANGUAGE_MODEL else None
  begun = bool(start) and all(row.startswith(start) for row in rows)
  with _calls:
    unpadded = tokenizer(rows, verbose=False, add_special_tokens=not begun)
    longest = max(len(ids) for ids in unpadded["input_ids"])
    encoded = tokenizer(
      rows,
      padding="max_length",
      max_length=length,
      truncation=True,
      padding_side=padding_side or tokenizer.padding_side,
      add_special_tokens=not begun,
    )
  if longest > length:
    _warn_truncated(longest, length)
  ids = np.asarray(encoded["input_ids"], np.int32)
  beyond = np.argwhere((ids < 0) | (ids >= num_embeddings))
  if beyond.size:
    number, place = beyond[0]
    found = int(ids[number, place])
    raise ValueError(
      f"prompt {number}, {rows[number][:60]!r}: expected ids below {num_embeddings}, as many as "
      f"the text encoder has embeddings, found {found}, {_token(tokenizer, found)}\n"
      f"name the tokenizer that it was trained with instead of {folder} (config.model.tokenizer, "
      "--tokenizer), or resize the embeddings in transformers (resize_token_embeddings)"
    )
  return ids, np.asarray(encoded["attention_mask"], bool)


def rendered(
  folder: str | os.PathLike, conversations: Sequence[Sequence[dict[str, Any]]], **options: Any
) -> list[str]:
  """Each conversation as the text that a language model reads, by its tokenizer's own template.

  Args:
    folder: of the tokenizer.
    conversations: messages `{"role": ..., "content": ...}`.
    **options: variables of the template, and `add_generation_prompt`.

  Raises ValueError if the tokenizer has no template, or one that fails.
  """
  tokenizer = _load(pathlib.Path(folder), LANGUAGE_MODEL)
  if not tokenizer.chat_template:
    raise ValueError(
      f"{folder}: expected a tokenizer with its chat template (chat_template.jinja, or "
      "chat_template in tokenizer_config.json), found none\ntake the tokenizer anew from the model"
    )
  try:
    found = [
      tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
      for messages in conversations
    ]
  except Exception as error:  # of a template, which is a program, nearly anything
    raise ValueError(
      f"{folder}: expected a chat template for a user's message, found one that fails: "
      f"{checks.cut(checks.in_one_line(error), 300)}\ntake the tokenizer anew from the model"
    ) from error
  for messages, row in zip(conversations, found, strict=True):
    content = messages[-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    if text.strip() not in row:
      raise ValueError(
        f"{folder}: expected a chat template that holds what the user says, {checks.shown(text)}, "
        f"found {checks.shown(row)}\ntake the tokenizer anew from the model"
      )
  return found


def check_folder(folder: str | os.PathLike, kind: str = "CLIP") -> None:
  """Raises ValueError unless `folder` holds a tokenizer's vocabulary."""
  folder, names = pathlib.Path(folder), _VOCABULARIES[kind]
  if not any((folder / name).is_file() for name in names):
    raise ValueError(f"expected the tokenizer's {folder / names[0]}, found none")


def copy(source: str | os.PathLike, target: str | os.PathLike, kind: str = "CLIP") -> None:
  """Copies the tokenizer's files; copying a folder onto itself does nothing."""
  source, target = pathlib.Path(source), pathlib.Path(target)
  check_folder(source, kind)
  target.mkdir(parents=True, exist_ok=True)
  if source.resolve() == target.resolve():
    return
  for name in _FILES:
    if (source / name).is_file():
      with files.replacing(target / name) as temporary:
        shutil.copyfile(source / name, temporary)


@functools.lru_cache(maxsize=8)
def _load(folder: pathlib.Path, kind: str):
  # Tokenizers are all that is used of it; its advice that PyTorch is missing would only alarm.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  check_folder(folder, kind)
  try:
    # A tokenizer may name code of its own in its config, which is not run, and nobody is asked.
    own_code = {"trust_remote_code": False} if kind == LANGUAGE_MODEL else {}
    tokenizer = getattr(transformers, _CLASSES[kind]).from_pretrained(folder, **own_code)
    if not isinstance(tokenizer.model_max_length, int | float):
      raise ValueError(f"model_max_length {checks.shown(tokenizer.model_max_length)} is no number")
    if tokenizer.pad_token is None:
      raise ValueError("no pad_token in tokenizer_config.json, to fill shorter prompts with")
  except Exception as error:  # of broken files transformers and tokenizers raise nearly anything
    raise ValueError(
      f"{folder}: expected the tokenizer of a {kind}, found files that give none: "
      f"{checks.cut(checks.in_one_line(error), 300)}\n"
      "take them anew from the model, or give another tokenizer (--tokenizer)"
    ) from error
  return tokenizer


def _token(tokenizer, number: int) -> str:
  token = checks.shown(tokenizer.convert_ids_to_tokens(number))
  return f"{token} for padding" if number == tokenizer.pad_token_id else token


def _warn_truncated(longest: int, length: int) -> None:
  if length not in _truncation_warned:
    _truncation_warned.add(length)
    warnings.warn(
      f"a prompt has {longest} tokens, the text encoder reads {length}: the rest is cut off "
      f"(reported once)",
      stacklevel=3,
    )
