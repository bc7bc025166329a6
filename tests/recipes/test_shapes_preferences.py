"""The preferences of the embedded world: repeatable, labelled as they say, and readable."""

import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import example_set, examples, preference_files, records
from jaxalign.modalities.image import IMAGES
from jaxalign.recipes import preference_pairs, shapes_preferences
from jaxalign.worlds.shapes import judge

parquet = pytest.importorskip("pyarrow.parquet")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
  "num_pairs": 5,
  "seed": 3,
  "temperature": 0.25,
  "guidance_scale": 2.0,
  "tie_margin": 0.5,
  "num_steps": 4,
  "eta": 1.0,
  "microbatch": 3,  # the second one is not full
  "split": "held_out",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("preferences") / "made"
  shapes_preferences.generate(output=folder, **SETTINGS)
  return folder


@pytest.fixture(scope="module")
def rows(folder):
  return parquet.read_table(folder / "pairs.parquet").to_pylist()


def pixels(row):
  return [np.asarray(Image.open(io.BytesIO(data))) for data in row["images"]]


def test_one_file_of_pairs_and_one_about_it(folder, rows):
  assert {path.name for path in folder.iterdir()} == {"pairs.parquet", "about.json"}
  assert len(rows) == 5
  assert set(rows[0]) == {"prompt", "images", "label_0", "judge"}
  known = {record["prompt"] for record in records.load("shapes/held_out").records}
  assert {row["prompt"] for row in rows} <= known
  assert {row["label_0"] for row in rows} <= {0.0, 0.5, 1.0}


def test_all_images_differ_and_the_judge_scored_these(rows):
  images = [image for row in rows for image in pixels(row)]
  assert all(image.shape == (64, 64, 3) and image.std() > 5 for image in images)
  assert len({image.tobytes() for image in images}) == 10
  for row in rows:
    scores = [judge.judge(image, row["prompt"]).score for image in pixels(row)]
    np.testing.assert_array_equal(row["judge"], scores)


def test_about_says_what_was_done_and_how_well_it_can_be_learnt(folder, rows):
  about = json.loads((folder / "about.json").read_text())
  assert {name: about[name] for name in SETTINGS} == SETTINGS
  difference = np.array([row["judge"][0] - row["judge"][1] for row in rows])
  first, second = (1 / (1 + np.exp(0.5 - d / 0.25)) for d in (difference, -difference))
  ceiling = np.maximum(first, second).sum() / (first + second).sum()
  np.testing.assert_allclose(about["accuracy_ceiling"], ceiling)
  assert about["equal_scores"] == np.mean(difference == 0)
  assert about["ties"] == np.mean([row["label_0"] == 0.5 for row in rows])


def test_the_same_flags_write_the_same_bits(folder, tmp_path):
  # Into a folder that has them already: they are replaced.
  for name in ("pairs.parquet", "about.json"):
    (tmp_path / name).write_text("old")
  shapes_preferences.generate(output=tmp_path, **SETTINGS)
  for name in ("pairs.parquet", "about.json"):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_reader_takes_the_label_and_not_the_judge(folder, rows):
  records, report = preference_files.load(folder / "pairs.parquet", IMAGES, max_bad_fraction=0.0)
  assert not report.bad
  pairs = example_set.ExampleSet(
    records, functools.partial(examples.pairs, ties="half"), IMAGES, shape=(64, 64, 3)
  )
  assert [record["prompt"] for record in pairs.records] == [row["prompt"] for row in rows]
  images = pairs.samples(np.arange(5))
  for row, (winner, loser) in zip(rows, images, strict=True):
    expected = pixels(row)[::-1] if row["label_0"] == 0 else pixels(row)
    np.testing.assert_array_equal([winner, loser], expected)


@pytest.mark.parametrize(
  "change, expected",
  [
    ({"num_pairs": 0}, "num_pairs"),
    ({"microbatch": 0}, "microbatch"),
    ({"temperature": 0.0}, "temperature above 0"),
    ({"temperature": float("nan")}, "temperature above 0"),
    ({"tie_margin": -1.0}, "tie_margin of at least 0"),
    ({"seed": -1}, "seed"),
    ({"split": "nowhere"}, "shapes/nowhere"),
  ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_sampled(
  tmp_path, monkeypatch, change, expected
):
  monkeypatch.setattr(preference_pairs, "_sample", None)  # calling it would be a TypeError
  with pytest.raises(ValueError, match=expected):
    shapes_preferences.generate(output=tmp_path, **{**SETTINGS, **change})


def test_the_command_ends_with_a_message_and_no_traceback(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "jaxalign.recipes.shapes_preferences", "--output=made", "--num_pairs=0"],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 1
  assert done.stderr.startswith("error: ") and "num_pairs" in done.stderr
  assert not list(tmp_path.iterdir())
