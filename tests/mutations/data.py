"""Mistakes in what files are read, and how: none of them ends a run."""

from mutations.mutant import Mutant

SOURCES = ("data/test_sources.py",)
LAYOUTS = ("data/test_layouts.py",)
READERS = ("data/test_readers.py",)
PICTURES = ("modalities/test_image_files.py",)

DATA = [
  Mutant(
    "shards come in the order of their letters",
    "data/sources.py",
    "int(part) if place % 2 else part",
    "part",
    SOURCES,
  ),
  Mutant(
    "train and test are read together",
    "data/sources.py",
    "if len(splits) > 1:",
    "if len(splits) > 3:",
    SOURCES,
  ),
  Mutant(
    "a file that is named twice counts twice",
    "data/sources.py",
    "    if key(path) in seen:",
    "    if False:",
    SOURCES,
  ),
  Mutant(
    "the share of votes is that of the second",
    "data/layouts.py",
    "return a / (a + b)",
    "return b / (a + b)",
    LAYOUTS,
  ),
  Mutant(
    "a path counts before the bytes",
    "data/preference_files.py",
    "given = content or path",
    "given = path or content",
    LAYOUTS,
  ),
  Mutant(
    "a cell too many is lost",
    "data/readers/delimited.py",
    "if len(cells) > len(names):",
    "if len(cells) > 99:",
    READERS,
  ),
  Mutant(
    "JSON in a text file is trained on",
    "data/readers/text.py",
    "if (numbered and _JSON.match(numbered[0][1])) or any(lines_of_json):",
    "if False:",
    READERS,
  ),
  Mutant(
    "a crop is not of the centre",
    "modalities/image.py",
    "left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)",
    "left, top = 0, 0",
    PICTURES,
  ),
  Mutant(
    "only the first shard has a digest",
    "training/workdir.py",
    "digests[0] if len(digests) == 1 else",
    "digests[0] if digests else",
    ("training/test_workdir.py",),
  ),
]
