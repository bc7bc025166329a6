"""What a sample looks like is known to modalities and families: the trunk says neither word."""

import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxalign"
# Above `models/` and `modalities/`. Commands have flags for prompts; recipes and speed benchmarks
# are of image models.
TRUNK = (
  *("steering", "methods", "training", "evaluation"),
  *("system.py", "train.py", "export.py"),
)
# Fits the network of one image reward.
APART = {"training/reward_model.py"}
FILES = [
  path
  for name in TRUNK
  for path in ([PACKAGE / name] if name.endswith(".py") else sorted((PACKAGE / name).rglob("*.py")))
  if path.relative_to(PACKAGE).as_posix() not in APART
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_trunk_speaks_of_samples_and_records(path):
  text = path.read_text().replace("add_image(", "")  # of tensorboardX
  assert not [line for line in text.splitlines() if re.search("image|prompt", line, re.I)]
