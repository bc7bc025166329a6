"""The preferences of plans: repeatable, judged by their worth, and read as they were sampled."""

import functools
import io
import json

import numpy as np
import pytest

from jaxalign import rewards
from jaxalign.data import example_set, examples, preference_files, records
from jaxalign.modalities.trajectory import PLANS
from jaxalign.recipes import planner_preferences, preference_pairs

parquet = pytest.importorskip("pyarrow.parquet")

SETTINGS = {
  "num_pairs": 7,
  "seed": 3,
  "temperature": 0.25,
  "tie_margin": 0.5,
  "guidance_scale": 1.0,
  "num_steps": 4,
  "microbatch": 4,  # the second one is not full
  "split": "validation",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("preferences") / "made"
  planner_preferences.generate(output=folder, **SETTINGS)
  return folder


@pytest.fixture(scope="module")
def rows(folder):
  return parquet.read_table(folder / "pairs.parquet").to_pylist()


def plans(row):
  return np.stack([np.load(io.BytesIO(data)) for data in row["samples"]])


def test_one_file_of_pairs_and_one_about_it(folder, rows):
  assert {path.name for path in folder.iterdir()} == {"pairs.parquet", "about.json"}
  assert len(rows) == 7 and set(rows[0]) == {"record", "samples", "label_0", "judge"}
  known = {json.dumps(record) for record in records.load("planner/validation").records}
  assert {json.dumps(row["record"]) for row in rows} <= known
  assert {row["label_0"] for row in rows} <= {0.0, 0.5, 1.0}
  about = json.loads((folder / "about.json").read_text())
  assert {name: about[name] for name in SETTINGS} == SETTINGS and about["model"] == "planner"
  assert about["ties"] == np.mean([row["label_0"] == 0.5 for row in rows])


def test_all_plans_differ_and_the_judge_is_the_reward(rows):
  found = np.concatenate([plans(row) for row in rows])
  assert found.shape == (14, 16, 2) and found.dtype == np.float32
  assert len({plan.tobytes() for plan in found}) == 14
  worth = rewards.make("planner").fn(found, [row["record"] for row in rows for _ in range(2)])
  np.testing.assert_allclose([row["judge"] for row in rows], worth.reshape(7, 2), atol=1e-5)


def test_labels_follow_the_judge(rows, tmp_path):
  sure = {"temperature": 1e-6, "tie_margin": 0.0}
  planner_preferences.generate(output=tmp_path, **{**SETTINGS, **sure})
  certain = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
  for row, same in zip(certain, rows, strict=True):
    assert row["samples"] == same["samples"]  # neither records nor noise depend on the labels
    assert row["label_0"] == float(row["judge"][0] > row["judge"][1])


def test_the_same_settings_write_the_same_bits_and_another_seed_others(folder, tmp_path):
  planner_preferences.generate(output=tmp_path / "same", **SETTINGS)
  for name in ("pairs.parquet", "about.json"):
    assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
  planner_preferences.generate(output=tmp_path / "other", **{**SETTINGS, "seed": 4})
  found = parquet.read_table(tmp_path / "other" / "pairs.parquet")["samples"].to_pylist()
  assert found != parquet.read_table(folder / "pairs.parquet")["samples"].to_pylist()


def test_the_reader_takes_records_and_plans_and_the_label(folder, rows):
  found, report = preference_files.load(folder / "pairs.parquet", PLANS, max_bad_fraction=0.0)
  assert not report.bad and [one.record for one in found] == [row["record"] for row in rows]
  of_record = functools.partial(examples.pairs, ties="half")
  pairs = example_set.ExampleSet(found, of_record, PLANS, shape=(16, 2))
  for row, read in zip(rows, pairs.samples(np.arange(7)), strict=True):
    np.testing.assert_array_equal(read, plans(row)[::-1] if row["label_0"] == 0 else plans(row))


def test_bradley_and_terry_and_the_ties_of_rao_and_kupper():
  scores = np.array([[0.5, 0.5], [0.75, 0.5], [0.0, 1.0], [1.0, 0.0]])
  # sigmoid(0), sigmoid(1), sigmoid(-4), sigmoid(4)
  expected = [0.5, 0.7310586, 0.0179862, 0.9820138]
  first, second = preference_pairs.choice_probabilities(scores, 0.25, 0.0)
  np.testing.assert_allclose(first, expected, rtol=1e-5)
  np.testing.assert_allclose(first + second, 1.0)  # no ties
  # With theta = e^2 and worths e^d and 1: first wins with e^d / (e^d + theta).
  first, second = preference_pairs.choice_probabilities(scores, 0.25, 2.0)
  worth, theta = np.exp([0.0, 1.0, -4.0, 4.0]), np.exp(2.0)
  np.testing.assert_allclose(first, worth / (worth + theta))
  np.testing.assert_allclose(second, 1 / (1 + theta * worth))
  tie = (theta**2 - 1) * worth / ((worth + theta) * (1 + theta * worth))
  np.testing.assert_allclose(1 - first - second, tie, rtol=1e-9)
  first, _ = preference_pairs.choice_probabilities(scores, 1e-300, 2.0)
  np.testing.assert_allclose(first, [1 / (1 + theta), 1, 0, 1])
