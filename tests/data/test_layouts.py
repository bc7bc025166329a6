"""Column maps: published layouts, maps of one's own, and pictures as the hub stores them."""

import csv
import json

import pytest
from preference_records import BLUE, RED, solid

from jaxalign.data import layouts, preference_files, preferences, records
from jaxalign.modalities.image import IMAGES

PATHS = ["0.png", "1.png"]


@pytest.fixture
def folder(tmp_path):
  for path, colour in zip(PATHS, (RED, BLUE), strict=True):
    (tmp_path / path).write_bytes(solid(colour))
  return tmp_path


def write(folder, rows, name="pairs.json"):
  """Rows in the format of the suffix, with bytes in them only as parquet."""
  path = folder / name
  if name.endswith("parquet"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif name.endswith("csv"):
    with path.open("w", newline="") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  else:
    path.write_text(json.dumps(rows))
  return path


def load(path, columns=None, **options):
  found, _ = preference_files.load(path, IMAGES, columns=columns, **options)
  return found


def winners(record):
  """The colours of the pairs of a record, winner first, and how sure they are."""
  pairs = preferences.to_pairs(record, "half")
  colour = [tuple(IMAGES.read(c.source)[0, 0].tolist()) for c in record.candidates]
  return [
    (colour[w], colour[v], round(float(p), 3))
    for w, v, p in zip(pairs.winner, pairs.loser, pairs.p, strict=True)
  ]


def picture(colour, path=None):
  return {"bytes": solid(colour), "path": path}


# Rows as they are published, in which blue is preferred; and how sure that is.
PUBLISHED = {
  "pick_a_pic": ("pairs.parquet", 1.0, {
    "are_different": True, "best_image_uid": "1", "caption": "a cat", "has_label": True,
    "jpg_0": solid(RED), "jpg_1": solid(BLUE), "label_0": 0.0, "label_1": 1.0, "ranking_id": 1,
  }),
  "hpd_v2": ("train.json", 1.0, {
    "human_preference": [0, 1], "prompt": "a cat", "file_path": PATHS, "user_hash": "u",
  }),
  "hpd_v2_test": ("test.json", 1.0, {
    "prompt": "a cat", "image_path": PATHS, "rank": [2, 1],
    "raw_annotations": [{"rank": [1, 2], "user_hash": "u"}],
  }),
  "hpd_v3": ("train.json", 1.0, {
    "prompt": "a cat", "path1": PATHS[1], "path2": PATHS[0], "confidence": 0.9, "model1": "m",
  }),
  "image_reward": ("test.json", 1.0, {
    "id": "1", "prompt": "a cat", "generations": PATHS, "ranking": [4, 2],
  }),
  "rapidata_votes": ("train.parquet", 0.75, {
    "prompt": "a cat", "image1": picture(RED), "image2": picture(BLUE), "votes_image1": 5,
    "votes_image2": 15, "model1": "m",
  }),
  "rapidata_preference": ("train.parquet", 0.75, {
    "prompt": "a cat", "image1": picture(RED), "image2": picture(BLUE),
    "weighted_results_image1_preference": 0.25, "weighted_results_image2_preference": 0.75,
  }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout(name, folder):
  file, p, row = PUBLISHED[name]
  path = write(folder, [row, row], file)
  (folder / "rows.jsonl").write_text(json.dumps(row, default=repr))
  first, _ = load(path, name)
  assert first.record == {"prompt": "a cat"} and winners(first) == [(BLUE, RED, p)]
  # The same file has the prompts, and says by itself what it is.
  assert records.load(path, name).records[0]["prompt"] == "a cat"
  if not {"images", "samples"} & row.keys():
    for other in (path, folder / "rows.jsonl"):  # in JSON, each row has columns of its own
      with pytest.raises(ValueError, match=f"--config.data.columns={name}"):
        load(other)


def test_every_layout_is_tried():
  assert {*PUBLISHED, "parti_prompts"} == set(layouts.LAYOUTS)


@pytest.mark.parametrize("columns", [
  {"prompt": "Text", "images": ["left", "right"], "label_0": "first"},
  "prompt=Text, images=left+right, label_0=first",
])  # fmt: skip
@pytest.mark.parametrize("file", ["pairs.csv", "pairs.jsonl", "pairs.json", "pairs.parquet"])
def test_a_map_of_ones_own(file, columns, folder):
  row = {"Text": "a cat", "left": PATHS[0], "right": PATHS[1], "first": 0.25, "more": 1}
  path = write(folder, [row], file)
  if file == "pairs.jsonl":
    path.write_text(json.dumps(row))
  (record,) = load(path, columns)
  assert record.record == {"prompt": "a cat"} and winners(record) == [(BLUE, RED, 0.75)]


def test_votes_that_are_none_are_a_bad_row(folder):
  rows = [{"prompt": "a", "images": PATHS, "a": a, "b": b} for a, b in ((1, 1), (0, 0), (-1, 2))]
  columns = {"label_0": ("a", "b")}
  _, report = preference_files.load(
    write(folder, rows), IMAGES, columns=columns, max_bad_fraction=0.9
  )
  assert [(bad.row, bad.reason) for bad in report.bad] == [(2, "no label"), (3, "bad label")]


@pytest.mark.parametrize("columns, expected", [
  ("pickapic", r'expected one of pick_a_pic, .*did you mean "pick_a_pic"'),
  (3, "expected a map from our names to columns, or one of pick_a_pic"),
  ({"imges": "left"}, r'expected one of prompt, .*did you mean "images"'),
  ({"images": None}, "expected for each field a column"),
  ({"images": []}, "expected for each field a column"),
  ({"images": "lefd"}, r'expected a column "lefd", found prompt, left, right; did you mean "left"'),
  ({}, r'columns "prompt" or "record", and "images" or "samples", found prompt, left, right\n'),
], ids=range(7))  # fmt: skip
def test_maps_that_fit_nothing(columns, expected, folder):
  path = write(folder, [{"prompt": "a", "left": "0.png", "right": "1.png"}], "pairs.csv")
  with pytest.raises(ValueError, match=expected) as caught:
    load(path, columns)
  assert len(str(caught.value).splitlines()) <= 3


def test_objects_of_bytes_and_a_path_wherever_a_sample_is_taken(folder):
  """Roblox/FAI-RL PR#81: columns of the type Image of the `datasets` library."""
  pairs = [
    [picture(RED), picture(BLUE, "nowhere.png")],
    [{"bytes": None, "path": "0.png"}, {"bytes": b"", "path": "1.png"}],
    [{"bytes": None, "path": str(folder / "0.png")}, picture(BLUE)],
  ]
  rows = [{"prompt": "a", "images": pair, "label_0": 0.0} for pair in pairs]
  found = load(write(folder, rows, "pairs.parquet"), max_bad_fraction=0.0)
  assert [winners(record) for record in found] == [[(BLUE, RED, 1.0)]] * 3
  row = {"prompt": "a", "images": [{"path": path} for path in PATHS], "label_0": 0.0}
  assert winners(load(write(folder, [row]))[0]) == [(BLUE, RED, 1.0)]


@pytest.mark.parametrize("sample, expected", [
  ({"bytes": None, "path": None}, "found None and None"),
  ({"bytes": "iVBORw0", "path": None}, "found 'iVBORw0' and None"),
  ({"url": "0.png"}, "expected paths or bytes, found a dict"),
  ("https://a.b/0.png", "download it first"),
])  # fmt: skip
def test_samples_that_are_none(sample, expected, folder):
  row = {"prompt": "a", "images": ["0.png", sample], "label_0": 1}
  with pytest.raises(ValueError, match=expected):
    load(write(folder, [row]))


def test_bad_rows_of_shards_say_their_file(folder):
  good = {"prompt": "a", "images": PATHS, "label_0": 1}
  for name, rows in {"a": [good] * 3, "b": [good, {**good, "images": ["no.png"]}]}.items():
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  source = f"{folder}/*.jsonl"
  found, report = preference_files.load(source, IMAGES, max_bad_fraction=0.5)
  assert len(found) == 4 and report.source == source
  assert [(bad.file, bad.row, bad.reason) for bad in report.bad] == [
    ("b.jsonl", 2, "missing image")
  ]
  with pytest.raises(ValueError, match=r"\nb\.jsonl row 2: no image file"):
    preference_files.load(source, IMAGES, max_bad_fraction=0.0)
  with pytest.raises(ValueError, match=r"preferences: .* ends in \.jsonl, .* found .*a\.txt"):
    (folder / "a.txt").write_text("a cat")
    preference_files.load(folder / "a.txt", IMAGES)


def test_two_columns_of_votes_are_a_share():
  row = {"a": 3, "b": 1}
  assert layouts.apply({"label_0": ("a", "b")}, row) == {"label_0": 0.75}
  with pytest.raises(ValueError, match="two columns of votes"):
    layouts.apply({"label_0": ("a", "b", "a")}, row)
