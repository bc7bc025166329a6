"""What a sample looks like is known to modalities and families: the trunk says neither word."""

import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxalign"
# Above `models/` and `modalities/`. Commands have flags for prompts; recipes and speed benchmarks
# are of image models.
TRUNK = (
  *("data", "steering", "methods", "training", "evaluation"),
  *("system.py", "train.py", "export.py"),
)
# Fits the network of one image reward; and what the columns of published files are called.
APART = {"training/reward_model.py", "data/layouts.py"}
# Names that are not chosen here: of tensorboardX, and the fields of files, in code and in a table.
GIVEN = re.compile(r'add_image\(|"(no )?(prompt|images?)"|^  (prompt|images)  ')
FILES = [
  path
  for name in TRUNK
  for path in ([PACKAGE / name] if name.endswith(".py") else sorted((PACKAGE / name).rglob("*.py")))
  if path.relative_to(PACKAGE).as_posix() not in APART
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_trunk_speaks_of_samples_and_records(path):
  lines = [GIVEN.sub("", line) for line in path.read_text().splitlines()]
  assert not [line for line in lines if re.search("image|prompt", line, re.I)]
