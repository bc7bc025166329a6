"""Files of records and of preferences changed at random are read, or refused in a few lines."""

import numpy as np
import pytest
from preference_records import BLUE, RED, solid

pytest.importorskip("pyarrow")
import file_mutations

from jaxalign.data import preference_files, records
from jaxalign.modalities.image import IMAGES

PROMPTS = [
  {"prompt": "a fox in the snow", "category": "animals", "count": 1},
  {"prompt": 'two red boats, one of them "small"', "category": "boats", "count": 2},
  {"prompt": "ein Bär", "category": "animals", "count": 3},
]
FORMATS = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
NEVER = ("PAR1", "ARROW1", "\x1f\x8b", "\x89PNG", '{"', "[{")  # no prompt begins so


@pytest.mark.parametrize("seed", range(4))
def test_500_files_of_prompts(seed, tmp_path):
  rng, read = np.random.default_rng(seed), 0
  for _ in range(500):
    file_mutations.clear(tmp_path)
    source = file_mutations.write(rng, PROMPTS, tmp_path, FORMATS)
    found = file_mutations.check(records.load, tmp_path, source)
    if found is not None:
      read += 1
      texts = [record["prompt"] for record in found.records if "prompt" in record]
      assert all(text.strip() and not text.startswith(NEVER) for text in texts), texts
  assert 100 < read < 400  # so that both sides are tried


@pytest.mark.parametrize("seed", range(4))
def test_500_files_of_preferences(seed, tmp_path):
  pictures = {"a.png": solid(RED), "b.png": solid(BLUE)}
  for name, content in pictures.items():
    (tmp_path / name).write_bytes(content)
  rows = [
    {"prompt": "a cat", "images": ["a.png", "b.png"], "label_0": 1.0},
    {"prompt": "a dog", "images": ["b.png", "a.png"], "label_0": 0.5},
    {"prompt": "a fox", "images": ["b.png", "b.png"], "label_0": 0.0},
  ]
  held = [
    {**row, "images": [{"bytes": pictures[name], "path": name} for name in row["images"]]}
    for row in rows
  ]
  columns = ["pick_a_pic", {"images": ("a", "b")}, {"prompt": "Prompt"}, "prompt=text"]
  rng, read = np.random.default_rng(seed), 0
  for _ in range(500):
    file_mutations.clear(tmp_path, kept=pictures)
    which = held if rng.random() < 0.3 else rows
    source = file_mutations.write(rng, which, tmp_path, FORMATS[-5:])
    options = {"columns": None, "max_bad_fraction": 0.7}
    if rng.random() < 0.3:
      options["columns"] = columns[rng.integers(len(columns))]

    def load(source, options=options):
      return preference_files.load(source, IMAGES, **options)

    found = file_mutations.check(load, tmp_path, source)
    if found is not None:
      read += 1
      assert all(record.record["prompt"].strip() for record in found[0] if record.record)
  assert 50 < read < 400
