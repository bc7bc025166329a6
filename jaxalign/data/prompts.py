"""Prompt sets: records `{"prompt": str, "category": str, ...}`, and which of them a step uses."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign import streams

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """A list of prompts whose categories are drawn equally often.

  Attributes:
    records: one mapping per prompt; a prompt's id is its index.
  """

  records: tuple[Record, ...]

  def draw(self, rng: np.random.Generator, num_prompts: int) -> np.ndarray:
    """Ids of `num_prompts` prompts, int32; categories balanced to within one.

    Which categories get the one more is random. Within a category prompts are drawn without
    replacement until it is used up.
    """
    categories: dict[str, list[int]] = {}
    for index, record in enumerate(self.records):
      categories.setdefault(record.get("category", ""), []).append(index)
    names = rng.permutation(list(categories))
    decks = {name: _endless(rng, ids) for name, ids in categories.items()}
    order = rng.permutation(num_prompts) % len(names)
    return np.array([next(decks[names[which]]) for which in order], np.int32)

  def draw_for_step(self, seed: int, step: int, num_prompts: int) -> np.ndarray:
    """`draw` as a pure function of the seed and the step, so that a resumed run sees the same."""
    return self.draw(streams.generator(seed, "prompts", step), num_prompts)

  def __getitem__(self, ids: np.ndarray) -> list[Record]:
    return [self.records[int(index)] for index in ids]

  def __len__(self) -> int:
    return len(self.records)


def _endless(rng: np.random.Generator, ids: list[int]):
  while True:
    yield from rng.permutation(ids)


SHAPES = ("shapes/train", "shapes/held_out", "shapes/validation", "shapes/test")
VALIDATION_SHARE = 3  # one prompt of so many


def split(prompts: PromptSet) -> tuple[PromptSet, PromptSet]:
  """(validation, test): about a third and two thirds of a set.

  A checksum of its text decides where a prompt belongs. So it never changes sides, whatever is
  added to the file or taken from it, and prompts that differ in case or spacing stay together.

  Raises ValueError if one side is empty.
  """
  sides: tuple[list[Record], list[Record]] = ([], [])
  for record in prompts.records:
    text = " ".join(record["prompt"].lower().split())
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    sides[0 if number % VALIDATION_SHARE == 0 else 1].append(record)
  if not all(sides):
    raise ValueError(
      f"prompts: expected enough to split into validation and test, found {len(prompts)}, which "
      f"give {len(sides[0])} and {len(sides[1])}\nadd prompts, or name files of your own: "
      "config.evaluation.validation, and source for the test"
    )
  return PromptSet(tuple(sides[0])), PromptSet(tuple(sides[1]))


def load(source: str) -> PromptSet:
  """Reads a prompt set.

  Args:
    source: a name of `SHAPES`, of which held_out is validation and test together; or a file: `.txt`
      with one prompt a line, or `.jsonl` with one object a line that has at least "prompt".

  Raises:
    ValueError: no such set or file, not UTF-8, empty, or a line without a prompt.
  """
  if source in SHAPES:
    return _shapes(source.removeprefix("shapes/"))
  path = pathlib.Path(source)
  if not path.is_file():
    raise ValueError(
      f"prompts: expected {', '.join(SHAPES)} or a .txt or .jsonl file; found no file "
      f'"{source}"'
    )
  try:
    # Not splitlines(), which also cuts at the separators that Unicode allows inside a text.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"prompts: {path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t utf-8"
    ) from error
  parse = _parse_json if path.suffix == ".jsonl" else _parse_text
  records = tuple(parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
  if not records:
    raise ValueError(f"prompts: {path} holds no prompt; expected one a line")
  return PromptSet(records)


def _shapes(split: str) -> PromptSet:
  from jaxalign.worlds.shapes import prompts as grammar

  chosen = getattr(grammar, f"{split}_prompts")()
  return PromptSet(tuple({"prompt": p.text, "category": p.category} for p in chosen))


def _parse_text(path: pathlib.Path, number: int, line: str) -> Record:
  del path, number
  return {"prompt": line.strip()}


def _parse_json(path: pathlib.Path, number: int, line: str) -> Record:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"prompts: {path} line {number} is not JSON: {error.msg}") from error
  prompt = record.get("prompt") if isinstance(record, dict) else None
  if not isinstance(prompt, str) or not prompt.strip():
    raise ValueError(f'prompts: {path} line {number}: expected an object with a text "prompt"')
  if not isinstance(record.get("category", ""), str):
    raise ValueError(f'prompts: {path} line {number}: expected "category" to be a text, if given')
  return record
