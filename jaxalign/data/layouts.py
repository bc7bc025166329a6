"""Column maps: which columns of a file hold what is asked for, by name for published data sets.

A map has for each of our fields the column that holds it, or several columns whose values make a
list, or a number that is the same in every row. `label_0` of two columns is a share of votes,
a / (a + b). Fields that a map does not name are read by their own names.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxalign import checks

Column = str | Sequence[str] | float
Columns = Mapping[str, Column]

# Pick-a-Pic v1 and v2 as train.py of SalesforceAIResearch/DiffusionDPO reads them; HPD v2 by the
# README of tgxs002/HPSv2, train.json and test.json; HPD v3, whose first image is the preferred one,
# and Rapidata's sets as public code reads MizzenAI/HPDv3 and those; ImageReward's lists by
# train/src/rank_pair_dataset.py of THUDM/ImageReward; PartiPrompts.tsv of google-research/parti.
LAYOUTS: Mapping[str, Columns] = {
  "pick_a_pic": {"prompt": "caption", "images": ("jpg_0", "jpg_1"), "label_0": "label_0"},
  "hpd_v2": {"prompt": "prompt", "images": "file_path", "scores": "human_preference"},
  "hpd_v2_test": {"prompt": "prompt", "images": "image_path", "rank": "rank"},
  "hpd_v3": {"prompt": "prompt", "images": ("path1", "path2"), "label_0": 1.0},
  "image_reward": {"prompt": "prompt", "images": "generations", "rank": "ranking"},
  "rapidata_votes": {
    "prompt": "prompt",
    "images": ("image1", "image2"),
    "label_0": ("votes_image1", "votes_image2"),
  },
  "rapidata_preference": {
    "prompt": "prompt",
    "images": ("image1", "image2"),
    "label_0": ("weighted_results_image1_preference", "weighted_results_image2_preference"),
  },
  "parti_prompts": {"prompt": "Prompt", "category": "Category"},
}
# Fields of a judgement, which are not of a record.
JUDGED = ("images", "samples", "label_0", "prob", "rank", "binary", "scores")
# How a map is given.
OF_TEXTS = (
  'say which it is with "prompt=NAME" (config.data.columns, config.evaluation.columns, or '
  "--columns of evaluate)"
)
OF_SAMPLES = "say which columns hold them: --config.data.columns=prompt=NAME,images=NAME+NAME"
# Names of the column of prompts, whatever their case.
TEXTS = ("prompt", "prompts", "text", "caption")


def parse(columns: str | Columns | None) -> Columns:
  """The map that `config.data.columns` says; none is an empty one.

  Args:
    columns: a name of `LAYOUTS`; a map; or a map as a text, "prompt=caption,images=a+b".
  """
  if columns is None or columns == "":
    return {}
  if isinstance(columns, str) and "=" in columns:
    pairs = [one.partition("=")[::2] for one in columns.split(",")]
    columns = {ours.strip(): _of_text(theirs) for ours, theirs in pairs}
  if isinstance(columns, str):
    checks.check_choice("config.data.columns", columns, LAYOUTS)
    return LAYOUTS[columns]
  if not isinstance(columns, Mapping):
    raise ValueError(
      "config.data.columns: expected a map from our names to columns, or one of "
      f"{', '.join(LAYOUTS)}; got {checks.shown(columns)}"
    )
  for ours, theirs in columns.items():
    _check(ours, theirs)
  return dict(columns)


def _of_text(theirs: str) -> str | tuple[str, ...]:
  names = tuple(name.strip() for name in theirs.split("+"))
  return names if len(names) > 1 else names[0]


def _check(ours: Any, theirs: Any) -> None:
  number = isinstance(theirs, int | float) and not isinstance(theirs, bool)
  names = [theirs] if isinstance(theirs, str) else theirs
  listed = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
  if not isinstance(ours, str) or not (number or (listed and names)):
    raise ValueError(
      "config.data.columns: expected for each field a column, a list of columns or a number; got "
      f"{checks.shown(theirs)} for {checks.shown(ours)}"
    )


def used(columns: Columns) -> list[str]:
  """The columns that a map names."""
  named = [theirs for theirs in columns.values() if not isinstance(theirs, int | float)]
  return [name for one in named for name in ([one] if isinstance(one, str) else one)]


def check_found(columns: Columns, found: Collection[str]) -> None:
  """Raises ValueError if a column that the map names is not among those of a file."""
  for name in used(columns):
    if name not in found:
      raise ValueError(
        f'config.data.columns: expected a column "{checks.cut(name, 80)}", found '
        f"{listed(found)}{checks.closest(name, found)}"
      )


def listed(names: Collection[str]) -> str:
  """Columns of a file for a message."""
  return checks.first(names, count=12, limit=200) or "none"


def suggestion(found: Collection[str]) -> str:
  """`; try --config.data.columns=...` for the layout that has the columns of a file, if any."""
  for name, columns in LAYOUTS.items():
    if "images" in columns and set(used(columns)) <= set(found):
      return f"; try --config.data.columns={name}"
  return ""


def apply(columns: Columns, row: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a row by our names; a column that the row does not have is a field not given."""
  fields = {name: value for name, value in row.items() if name not in used(columns)}
  for ours, theirs in columns.items():
    if isinstance(theirs, int | float):
      fields[ours] = theirs
    elif isinstance(theirs, str):
      fields[ours] = row.get(theirs)
    else:
      values = [row.get(name) for name in theirs]
      absent = any(value is None for value in values)
      fields[ours] = None if absent else _share(values) if ours == "label_0" else values
  return fields


def _share(votes: list[Any]) -> float | None:
  """The share of the first of two numbers of votes; None where nobody voted, as without a label."""
  if len(votes) != 2:
    raise ValueError(f"label_0: expected two columns of votes, got {len(votes)}")
  a, b = map(float, votes)
  if not (math.isfinite(a + b) and a >= 0 and b >= 0):
    raise ValueError(f"label_0: expected votes of at least 0, got {a} and {b}")
  return a / (a + b) if a + b else None


def text_column(names: Collection[str]) -> str | None:
  """Which column is the prompt, None if there is none; ValueError if there are several."""
  if "prompt" in names:
    return "prompt"
  found = [name for name in names if name.strip().lower() in TEXTS]
  if len(found) > 1:
    raise ValueError(f'expected one column "prompt", found {listed(found)}\n{OF_TEXTS}')
  return found[0] if found else None
