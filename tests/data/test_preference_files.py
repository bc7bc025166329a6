"""Files of preferences: what comes back, what is set aside, and when reading stops."""

import json
import sys

import numpy as np
import pytest
from preference_records import BLUE, NOISE, RED, encode, solid

from jaxalign.data import preference_files
from jaxalign.modalities.image import IMAGES
from jaxalign.modalities.trajectory import PLANS


def write_jsonl(folder, rows, name="pairs.jsonl"):
  """Rows are objects or, for lines that are none, bytes."""
  lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
  (folder / name).write_bytes(b"\n".join(lines) + b"\n")
  return folder / name


def write_parquet(folder, rows, name="pairs.parquet"):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
  parquet.write_table(pyarrow.table(columns), folder / name)
  return folder / name


@pytest.fixture
def folder(tmp_path):
  """A folder with the images 0.png and 1.png in `images`."""
  (tmp_path / "images").mkdir()
  for i, colour in enumerate((RED, BLUE)):
    (tmp_path / "images" / f"{i}.png").write_bytes(solid(colour))
  return tmp_path


PATHS = ["images/0.png", "images/1.png"]
GOOD = {"prompt": "a cat", "images": PATHS, "label_0": 1.0}


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_every_label_comes_back_from_both_kinds_of_file(folder, write):
  path = write(
    folder,
    [
      {"prompt": "ein Bär", "images": PATHS, "label_0": 0.0, "prob": None, "ignored": 3},
      {"prompt": "b", "images": PATHS, "prob": [[None, 0.75], [0.25, None]]},
      {"prompt": "c", "images": [*PATHS, PATHS[0]], "rank": [2, 1, None]},
      {"prompt": "d", "images": PATHS[:1], "binary": [1]},
      {"prompt": "e", "images": PATHS, "scores": [-1.5, 2]},
    ],
  )
  records, report = preference_files.load(path, IMAGES)
  assert [r.record["prompt"] for r in records] == ["ein Bär", "b", "c", "d", "e"]
  np.testing.assert_array_equal(records[0].prob, [[np.nan, 0], [1, np.nan]])
  np.testing.assert_array_equal(records[1].prob, [[np.nan, 0.75], [0.25, np.nan]])
  np.testing.assert_array_equal(records[2].rank, [2, 1, np.nan])
  np.testing.assert_array_equal(records[3].binary, [1])
  np.testing.assert_array_equal(records[4].scores, [-1.5, 2])
  for r in records:
    colours = [tuple(IMAGES.read(c.source)[0, 0].tolist()) for c in r.candidates]
    assert colours == [RED, BLUE, RED][: len(colours)]
    assert all(c.shape == (4, 6, 3) for c in r.candidates)
  assert report == preference_files.Report(str(path), 5, ())
  assert report.summary() == f"{path}: 5 of 5 rows read"


def test_parquet_may_hold_the_images_themselves(tmp_path):
  rows = [{"prompt": str(i), "images": [solid(RED), solid(BLUE)], "label_0": 1} for i in range(600)]
  records, _ = preference_files.load(write_parquet(tmp_path, rows), IMAGES)
  assert [r.record["prompt"] for r in records] == [str(i) for i in range(600)]  # more than one read
  assert tuple(IMAGES.read(records[-1].candidates[1].source)[0, 0]) == BLUE
  assert b"PNG" not in repr(records[-1]).encode()


def test_a_record_may_have_other_fields_and_samples_be_of_another_kind(tmp_path):
  plans = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
  contents = [path.read_bytes() for path in PLANS.write(plans, tmp_path)]
  record = {"start": [-0.9, 0.1], "goal": [0.9, 0.2]}
  row = {"record": {**record, "note": None}, "prompt": None, "label_0": 0.0}
  paths = write_jsonl(tmp_path, [{**row, "samples": ["0000.npy", "0001.npy"]}])
  held = write_parquet(tmp_path, [{**row, "samples": contents}] * 3)
  for path, count in ((paths, 1), (held, 3)):
    records, _ = preference_files.load(path, PLANS, max_bad_fraction=0.0)
    assert [r.record for r in records] == [record] * count  # what is null is not given
    found = [PLANS.read(c.source) for c in records[-1].candidates]
    np.testing.assert_array_equal(found, plans)
    assert {(c.shape, str(c.dtype)) for c in records[-1].candidates} == {((4, 2), "float32")}


def test_a_record_may_have_no_fields_or_be_a_text(folder):
  rows = [{**GOOD, "prompt": None, "record": record} for record in ({}, {"prompt": "a"})]
  records, _ = preference_files.load(write_jsonl(folder, rows), IMAGES)
  assert [r.record for r in records] == [{}, {"prompt": "a"}]


def test_samples_of_the_wrong_kind_are_bad_rows(folder):
  with pytest.raises(ValueError, match=r"1 unreadable image\n.*\.npy array in .*0\.png"):
    preference_files.load(write_jsonl(folder, [GOOD]), PLANS)


def test_a_modality_that_reads_no_files_is_refused(folder):
  with pytest.raises(ValueError, match=r"images, have no function for it: Modality\.read"):
    preference_files.load(write_jsonl(folder, [GOOD]), IMAGES._replace(read=None))


def test_windows_files_and_blank_lines(folder):
  path = folder / "pairs.jsonl"
  line = json.dumps({**GOOD, "prompt": "a\u2028b"}, ensure_ascii=False).encode()
  path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
  records, _ = preference_files.load(path, IMAGES)
  assert [r.record["prompt"] for r in records] == ["a\u2028b"] * 2


BAD_ROWS = [
  (b"{", "not JSON", "not JSON: "),
  (b'"a cat"', "not JSON", "expected a JSON object, found a str"),
  (b'{"prompt": "\xe4"}', "not JSON", "utf-8"),
  (b"[" * 100_000, "not JSON", "not JSON"),
  ({**GOOD, "prompt": " "}, "no prompt", 'a text "prompt"'),
  ({**GOOD, "prompt": 3}, "no prompt", 'a text "prompt"'),
  ({"images": PATHS, "label_0": 1}, "no prompt", 'a text "prompt"'),
  ({**GOOD, "record": {"prompt": "a cat"}}, "bad record", '"prompt" or "record", found both'),
  ({**GOOD, "prompt": None, "record": "a cat"}, "bad record", "found a str"),
  ({**GOOD, "prompt": None, "record": {"prompt": " "}}, "bad record", '"prompt" to be a text'),
  ({"prompt": "a", "label_0": 1}, "no samples", '"images" or "samples" of at least one'),
  ({**GOOD, "samples": PATHS}, "bad samples", '"images" or "samples", found both'),
  ({**GOOD, "images": None, "samples": []}, "no samples", 'a list "samples"'),
  ({**GOOD, "images": None, "samples": ["b.png"]}, "missing sample", "no sample file"),
  ({**GOOD, "images": None, "samples": ["bad.png"]}, "unreadable sample", "bad.png"),
  ({**GOOD, "images": []}, "no images", 'a list "images"'),
  ({**GOOD, "images": "images/0.png"}, "no images", 'a list "images"'),
  ({**GOOD, "images": [PATHS[0], 3]}, "no images", "paths or bytes, found a int"),
  ({**GOOD, "images": [PATHS[0], "b.png"]}, "missing image", "b.png"),
  ({**GOOD, "images": [PATHS[0], "images"]}, "missing image", "images"),
  ({**GOOD, "images": [PATHS[0], "x" * 5000]}, "missing image", "xxx"),
  ({**GOOD, "images": [PATHS[0], "bad.png"]}, "unreadable image", "bad.png"),
  ({"prompt": "a", "images": PATHS}, "no label", "one of label_0, prob, rank, binary, scores"),
  ({**GOOD, "rank": [1, 2]}, "bad label", "found label_0 and rank"),
  ({**GOOD, "images": PATHS[:1]}, "bad label", "label_0: expected two samples, got 1"),
  ({**GOOD, "label_0": 2}, "bad label", "from 0 to 1, got 2"),
  ({**GOOD, "label_0": "first"}, "bad label", "first"),
  ({**GOOD, "label_0": [1]}, "bad label", "list"),
  ({"prompt": "a", "images": PATHS, "rank": [1]}, "bad label", "rank: expected [2]"),
  ({"prompt": "a", "images": PATHS, "rank": [0, 1]}, "bad label", "got 0"),
  ({"prompt": "a", "images": PATHS, "rank": 1}, "bad label", "rank: expected [2]"),
  ({"prompt": "a", "images": PATHS, "prob": [[None, 1], [0]]}, "bad label", "inhomogeneous"),
  ({"prompt": "a", "images": PATHS, "scores": [10**400, 0]}, "bad label", "too large"),
  ({"prompt": "a", "images": PATHS, "scores": [np.nan, None]}, "bad label", "only unknown"),
]


@pytest.mark.parametrize("row, reason, detail", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_set_aside_and_named(folder, row, reason, detail):
  (folder / "bad.png").write_bytes(encode(NOISE)[:1500])
  path = write_jsonl(folder, [GOOD, b"", row, GOOD])
  records, report = preference_files.load(path, IMAGES, max_bad_fraction=0.5)
  assert len(records) == 2 and report.num_rows == 3
  (bad,) = report.bad
  assert (bad.row, bad.reason) == (3, reason)  # the blank line counts, as in an editor
  assert detail in bad.detail


def test_bad_rows_of_parquet(tmp_path):
  images = [solid(RED), solid(BLUE)]
  rows = [{"prompt": f"p{i}", "images": images, "label_0": i % 2} for i in range(300)]
  rows[100]["prompt"] = None
  rows[280] = {**rows[280], "images": [images[0], b"no image"]}
  records, report = preference_files.load(write_parquet(tmp_path, rows), IMAGES)
  assert len(records) == 298
  assert [(b.row, b.reason) for b in report.bad] == [(101, "no prompt"), (281, "unreadable image")]


def test_the_report_can_be_written(folder):
  rows = [GOOD] * 3 + [{**GOOD, "images": ["x.png"]}, b"{", {**GOOD, "images": ["y.png"]}]
  _, report = preference_files.load(write_jsonl(folder, rows), IMAGES, max_bad_fraction=0.5)
  assert report.summary().endswith(
    "3 of 6 rows read; 3 set aside: 2 missing image, 1 not JSON"
  )
  report.write(folder / "report.json")
  written = json.loads((folder / "report.json").read_text())
  assert written["counts"] == {"missing image": 2, "not JSON": 1}
  assert (written["num_rows"], written["num_records"]) == (6, 3)
  assert [(row["row"], row["reason"]) for row in written["bad"]] == [
    (4, "missing image"), (5, "not JSON"), (6, "missing image")
  ]
  assert "x.png" in written["bad"][0]["detail"]


def error_of(source, **options):
  with pytest.raises(ValueError) as caught:
    preference_files.load(source, IMAGES, **options)
  message = str(caught.value)
  assert 1 <= len(message.splitlines()) <= 3
  return message


def test_too_many_bad_rows_stop(folder):
  rows = [GOOD] * 4 + [{**GOOD, "images": [f"{i}.png"]} for i in range(4)] + [b"{"] * 2
  path = write_jsonl(folder, rows)
  message = error_of(path, max_bad_fraction=0.59)
  assert "4 of 10 rows read; 6 set aside: 4 missing image, 2 not JSON" in message
  assert "row 5: " in message and "row 7: " in message and "row 8: " not in message
  assert "max_bad_fraction=0.59" in message
  assert len(preference_files.load(path, IMAGES, max_bad_fraction=0.6)[0]) == 4


def test_no_good_row_is_an_error_whatever_is_allowed(folder):
  assert "0 of 1 rows read" in error_of(write_jsonl(folder, [b"{"]), max_bad_fraction=1.0)


def test_files_that_cannot_be_read(tmp_path):
  assert "found no such file" in error_of(tmp_path / "no.jsonl")
  assert "found no file to read in the folder" in error_of(tmp_path)
  (tmp_path / "pairs.yaml").write_text("prompt: a")
  assert "ends in .jsonl, .ndjson, .json, .csv" in error_of(tmp_path / "pairs.yaml")
  assert "is empty" in error_of(write_jsonl(tmp_path, [b""]))
  assert "max_bad_fraction: expected a share" in error_of(tmp_path, max_bad_fraction=2)


def test_parquet_files_that_cannot_be_read(tmp_path):
  path = write_parquet(tmp_path, [{"caption": "a cat", "jpg_0": b""}])
  expected = 'columns "prompt" or "record", and "images" or "samples", found caption, jpg_0'
  assert expected in error_of(path)
  path = write_parquet(tmp_path, [{"prompt": str(i), "images": [solid(RED)]} for i in range(9)])
  content = path.read_bytes()
  for broken in (b"", content[:-20], content[:8] + bytes(200) + content[208:]):
    path.write_bytes(broken)
    assert "no whole parquet file" in error_of(path)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "pairs.parquet").touch()
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert 'pip install "jaxalign[data]"' in error_of(tmp_path / "pairs.parquet")
