"""docs/flow.md speaks of files, functions and random streams that are there."""

import importlib
import pathlib
import re

import pytest

from jaxalign import streams

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "flow.md").read_text()
ROWS = [
  [cell.strip() for cell in row.strip("|").split("|")]
  for row in PAGE.splitlines()
  if row.startswith("| ") and not row.startswith("| what happens")
]
# Where a function is that the page names by its module alone.
FOLDERS = {
  "online": "training.feeds.online", "sharding": "distributed.sharding", "system": "system",
  "update": "training.update",
}  # fmt: skip


def test_every_stream_is_one_of_the_package_with_its_integers():
  found = re.findall(r"`([^`]+)` \(([^)]+)\)", " ".join(row[-1] for row in ROWS))
  assert len(found) >= 8
  for name, integers in found:
    assert streams.NAMES[name] == tuple(integers.split(", "))
  run = list(streams.NAMES)  # those of an iteration of a run, but for the order of the page
  assert {name for name, _ in found} == set(run[run.index("records") : run.index("loss") + 1])


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE))))
def test_every_file_is_there(name):
  package = ROOT / "jaxalign"
  assert (package / name).exists() or (package / "training" / name).exists()


@pytest.mark.parametrize(
  "module, function",
  sorted(set(re.findall(rf"`({'|'.join(FOLDERS)})\.(?!py`)([a-z_]+)`", PAGE))),
)
def test_every_function_is_there(module, function):
  found = importlib.import_module(f"jaxalign.{FOLDERS[module]}")
  assert f"def {function}(" in pathlib.Path(found.__file__).read_text()
