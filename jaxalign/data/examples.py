"""Examples of stored preferences: what methods make of the label of a record."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxalign.data import preferences


class Examples(NamedTuple):
  """The E examples of one record.

  candidates: int32 `[E]`, or `[E, n]` where an example is n candidates.
  values:     `{name: [E, ...]}`, what is known of each.
  """

  candidates: np.ndarray
  values: Mapping[str, np.ndarray]


# examples(record, **options) -> Examples, of none where the label says nothing
ExamplesFn = Callable[..., Examples]


def pairs(record: preferences.Record, *, ties: str) -> Examples:
  """Every comparison, winner first, with the value "p" `[E]`: P(the first is better), 0.5 a tie.

  `ties` as in `preferences.to_pairs`: "drop", or "half" to keep them.
  """
  found = preferences.to_pairs(record, ties)
  return Examples(np.stack([found.winner, found.loser], axis=1), {"p": found.p})


def choices(record: preferences.Record, *, ties: str) -> Examples:
  """As `pairs`, for a loss that does not use "p": ValueError for `ties` other than "drop"."""
  if ties != "drop":
    raise ValueError(
      f'config.data.ties: expected "drop", because the loss of config.method does not use the '
      f'probability of a label; got "{ties}"\nor take a method that does, such as "dpo"'
    )
  return pairs(record, ties=ties)


def thumbs(record: preferences.Record, *, threshold: float) -> Examples:
  """Candidates by themselves, with the value "good" `[E]`: 1.0, or 0.0 for a bad one.

  `threshold` as in `preferences.to_binary`, without effect on labels that are binary. Candidates of
  which it says neither are left out.
  """
  binary = preferences.to_binary(record, threshold)
  known = np.flatnonzero(binary >= 0).astype(np.int32)
  return Examples(known, {"good": binary[known].astype(np.float32)})
