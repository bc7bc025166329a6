"""Coloured shapes on coloured grounds: `scene` draws, `prompts` describes, `judge` decides."""

from jaxalign.types import Record


def records(split: str) -> tuple[Record, ...]:
  """Prompts with their categories: those of "train", "held_out", "validation" or "test".

  "held_out" is validation and test together.
  """
  from jaxalign.worlds.shapes import prompts

  chosen = getattr(prompts, f"{split}_prompts")()
  return tuple({"prompt": prompt.text, "category": prompt.category} for prompt in chosen)
