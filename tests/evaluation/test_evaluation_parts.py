"""What selects does not report: an evaluation's parts have no prompt and no noise in common."""

import types

import numpy as np
import pytest

from jaxalign.distributed import sharding
from jaxalign.evaluation import evaluation
from jaxalign.modalities.image import IMAGES

SECTION = {
  "num_samples": 24,
  "rewards": ("jpeg_compressibility",),
  "seed": 7,
  "microbatch": 8,
  "features": "pixels",
}

CHAIN = {"name": "chain", "kl_bound": 0.0}
MODEL = types.SimpleNamespace(modality=IMAGES)


def make(**changes):
  return evaluation.make_evaluations(**{**SECTION, "source": "shapes/held_out", **changes})


def texts(part):
  return {record["prompt"] for record in part.records.records}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_text("".join(f"prompt {number}\n" for number in range(60)))
  return str(path)


class Stub:
  """A `System` that keeps what noise and prompts it was asked for; its images are grey."""

  def __init__(self):
    self.asked = []
    self.model = types.SimpleNamespace(modality=IMAGES)
    self.mesh = sharding.one_device()

  def sample_all(self, params, records, *, microbatch, seed, part, kl, each):
    self.asked.append((tuple(record["prompt"] for record in records), seed, part))
    for start in range(0, len(records), microbatch):
      each(np.zeros((microbatch, 8, 8, 3)), np.arange(start, start + microbatch))
    return np.full((len(records), 8, 8, 3), params, np.float32), None


def test_named_parts_are_what_they_say():
  parts = make(source="shapes/test", validation="shapes/validation")
  assert (parts.validation.part, parts.validation.source) == ("validation", "shapes/validation")
  assert (parts.test.part, parts.test.source) == ("test", "shapes/test")
  assert parts.test.validation == "shapes/validation" and parts.shown is parts.validation
  assert texts(parts.validation) and not texts(parts.validation) & texts(parts.test)


def test_a_file_of_ones_own_is_split_where_something_selects(file):
  parts = make(source=file, every=5)
  assert texts(parts.validation) and not texts(parts.validation) & texts(parts.test)
  assert texts(parts.validation) | texts(parts.test) == {f"prompt {n}" for n in range(60)}
  assert parts.test.source == f"two thirds of {file}" and parts.test.part == "test"
  assert parts.test.validation == parts.validation.source == f"a third of {file}"
  whole = make(source=file)
  assert whole.validation is None and whole.shown is whole.test
  assert whole.test.part == "all" and len(texts(whole.test)) == 60


def test_the_noise_of_the_parts_differs(file):
  parts, stub = make(source=file, every=5), Stub()
  for part in (parts.validation, parts.test, make(source=file).test):
    part.run(stub, 0.5)
  noises = {asked[1:] for asked in stub.asked}
  assert len(noises) == 3
  assert not set(stub.asked[0][0]) & set(stub.asked[1][0])


def test_a_prompt_on_both_sides_is_refused(file, tmp_path):
  other = tmp_path / "other.txt"
  other.write_text("prompt 3\nanother\n")
  with pytest.raises(ValueError, match=r"validation: expected other records .* found 1 of them"):
    make(source=file, validation=str(other))
  with pytest.raises(ValueError, match="found 57 of them in shapes/validation, such as"):
    make(source="shapes/held_out", validation="shapes/validation")


def test_the_report_and_the_table_say_which_part_they_are_of(file):
  scores = evaluation.Scores(
    np.zeros((24, 8, 8, 3)), {"jpeg_compressibility": np.zeros(24)}, None, 0.5, 1.0
  )
  parts = make(source="shapes/test", validation="shapes/validation")
  comparison = evaluation.Comparison(parts.test, MODEL, scores, scores, (0, 8), CHAIN)
  report = comparison.report()
  assert [report[name] for name in ("part", "source", "validation")] == [
    "test", "shapes/test", "shapes/validation"
  ]  # fmt: skip
  assert report["kl_to_ref"] is None and report["kl_steps"] == [0, 8]
  lines = comparison.table().splitlines()
  assert lines[0].startswith("test: 24 images of ") and "shapes/test" in lines[0]
  assert "validation during the run, shapes/validation" in lines[1]
  whole = evaluation.Comparison(make(source=file).test, MODEL, scores, scores, (0, 8), CHAIN)
  assert whole.report()["part"] == "all" and whole.report()["validation"] is None
  assert "validation" not in whole.table()


def test_a_kl_goes_with_the_steps_that_it_is_over_and_with_its_floor():
  scores = evaluation.Scores(
    np.zeros((24, 8, 8, 3)), {"jpeg_compressibility": np.zeros(24)}, np.full(24, 9.3), 0.5, 1.0
  )
  comparison = evaluation.Comparison(make().test, MODEL, scores, scores, (7, 8), CHAIN, 0.019)
  assert "9.300 nats over 7 of 8 steps; 0.019 are rounding" in comparison.table()
  assert comparison.report()["kl_floor"] == 0.019


def test_of_one_prompt_there_is_no_interval_and_the_report_says_null(tmp_path):
  path = tmp_path / "one.txt"
  path.write_text("a circle\n")
  one = make(source=str(path), num_samples=4).test
  scores = evaluation.Scores(
    np.zeros((4, 8, 8, 3)), {"jpeg_compressibility": np.zeros(4)}, np.ones(4), 0.5, 1.0
  )
  comparison = evaluation.Comparison(one, MODEL, scores, scores, (8, 8), CHAIN)
  assert comparison.report()["rewards"]["jpeg_compressibility"]["interval_95"] is None
  assert "none: one record" in comparison.table()


def test_the_settings_change_with_all_that_changes_the_scores():
  base = make(source="shapes/test", validation="shapes/validation").validation.settings
  for changes in (
    {"num_samples": 23}, {"seed": 8}, {"microbatch": 4}, {"rewards": ("jpeg_incompressibility",)}
  ):  # fmt: skip
    other = make(source="shapes/test", validation="shapes/validation", **changes)
    assert other.validation.settings != base
  assert make(every=5).validation.settings != base
