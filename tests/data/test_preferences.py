"""Preferences: labels and what ties mean, odd images, bad rows, and batches that repeat exactly."""

import collections
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import preference_files, preference_pairs, preferences

NAN = np.nan
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def solid(colour, size=(4, 6)):
  """The bytes of an image of one colour; size is (height, width)."""
  return encode(Image.new("RGB", size[::-1], colour))


def record(n=None, prompt="a cat", **labels):
  """A record of `n` images, whose grey is their index."""
  labels = {name: np.array(values, np.float32) for name, values in labels.items()}
  n = len(next(iter(labels.values()))) if n is None else n
  candidates = tuple(preferences.make_candidate(solid((i, i, i))) for i in range(n))
  return preferences.Record(prompt, candidates, **labels)


def comparisons(label, ties="drop"):
  """{(winner, loser): p} of a label."""
  pairs = preferences.to_pairs(label, ties)
  assert pairs.winner.dtype == pairs.loser.dtype == np.int32
  assert pairs.p.dtype == pairs.weight.dtype == np.float32
  keys = zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True)
  return dict(zip(keys, pairs.p.tolist(), strict=True))


# ---- labels to pairs


def test_a_choice_between_two():
  assert comparisons(record(prob=[[NAN, 1], [0, NAN]])) == {(0, 1): 1.0}
  assert comparisons(record(prob=[[NAN, 0], [1, NAN]])) == {(1, 0): 1.0}
  assert comparisons(record(prob=[[NAN, 0.25], [0.75, NAN]])) == {(1, 0): 0.75}


def test_a_tie_is_dropped_or_kept_as_a_half():
  tie = record(prob=[[NAN, 0.5], [0.5, NAN]])
  assert comparisons(tie) == {}
  assert comparisons(tie, "half") == {(0, 1): 0.5}


def test_half_a_matrix_is_enough_and_its_diagonal_is_not_read():
  # The second of three was chosen: only the winner's row is filled in.
  chosen = record(prob=[[0.5, NAN, NAN], [1, 0.5, 1], [NAN, NAN, 0.5]])
  assert comparisons(chosen, "half") == {(1, 0): 1.0, (1, 2): 1.0}


def test_ranks_with_a_tie_a_gap_and_an_unknown():
  ranked = record(rank=[2, 5, 2, NAN])
  assert comparisons(ranked) == {(0, 1): 1.0, (2, 1): 1.0}
  assert comparisons(ranked, "half") == {(0, 1): 1.0, (2, 1): 1.0, (0, 2): 0.5}


def test_scores_are_higher_the_better():
  assert comparisons(record(scores=[0.1, -3, 0.1, NAN])) == {(0, 1): 1.0, (2, 1): 1.0}
  assert (0, 2) in comparisons(record(scores=[0.1, -3, 0.1, NAN]), "half")


def test_two_good_images_are_not_compared_and_so_no_tie():
  label = record(binary=[1, 1, 0, -1, 0])
  expected = {(0, 2): 1.0, (0, 4): 1.0, (1, 2): 1.0, (1, 4): 1.0}
  assert comparisons(label) == comparisons(label, "half") == expected


@pytest.mark.parametrize("ties, num_pairs", [("drop", 35), ("half", 36)])
def test_a_record_counts_once_however_many_pairs_it_has(ties, num_pairs):
  pairs = preferences.to_pairs(record(rank=[1, 1, 3, 4, 5, 6, 7, 8, 9]), ties)
  assert len(pairs.p) == num_pairs
  np.testing.assert_allclose(pairs.weight, 1 / num_pairs)


def test_a_record_without_a_comparison_has_no_pairs():
  assert comparisons(record(scores=[1])) == comparisons(record(rank=[1, NAN]), "half") == {}


def test_an_unknown_tie_policy_is_refused():
  with pytest.raises(ValueError, match='"drop" or "half", got "keep"'):
    preferences.to_pairs(record(rank=[1, 2]), "keep")


# ---- labels to rankings and to good and bad


@pytest.mark.parametrize(
  "label, expected",
  [
    ({"rank": [3, 7, 3, NAN]}, [1, 3, 1, NAN]),
    ({"scores": [0.5, NAN, 2.0, 0.5]}, [2, NAN, 1, 2]),
    ({"binary": [0, 1, -1, 1]}, [3, 1, NAN, 1]),
    ({"prob": [[NAN, 0.2], [0.8, NAN]]}, [2, 1]),
    ({"prob": [[NAN, 0.5], [0.5, NAN]]}, [1, 1]),
    # Means of the rows: (0.9 + 0.6) / 2, (0.1 + 0.3) / 2, (0.4 + 0.7) / 2, none.
    ({"prob": [[NAN, 0.9, 0.6, NAN], [NAN, NAN, 0.3, NAN], [NAN] * 4, [NAN] * 4]}, [1, 3, 2, NAN]),
    # Each beats the next with 0.7: the means are all one half, whatever the rounding of 1 - 0.7.
    ({"prob": [[NAN, 0.7, 0.3], [0.3, NAN, 0.7], [0.7, 0.3, NAN]]}, [1, 1, 1]),
  ],
)
def test_rankings(label, expected):
  actual = preferences.to_ranking(record(**label))
  np.testing.assert_array_equal(actual, expected)
  assert actual.dtype == np.float32


@pytest.mark.parametrize(
  "label, threshold, expected",
  [
    ({"scores": [3, 4, 5, NAN]}, 4, [0, 1, 1, -1]),
    ({"rank": [1, 2, 3, NAN]}, 2, [1, 1, 0, -1]),
    ({"binary": [1, 0, -1]}, None, [1, 0, -1]),
    ({"prob": [[NAN, 1], [0, NAN]]}, 0.5, [1, 0]),
    ({"prob": [[NAN, 0.5], [0.5, NAN]]}, 0.5, [-1, -1]),
    ({"prob": [[NAN, 1, NAN], [NAN] * 3, [NAN] * 3]}, 0.5, [1, 0, -1]),
  ],
)
def test_good_and_bad(label, threshold, expected):
  actual = preferences.to_binary(record(**label), threshold)
  np.testing.assert_array_equal(actual, expected)
  assert actual.dtype == np.int8


def test_a_threshold_is_needed_where_the_label_is_not_binary():
  with pytest.raises(ValueError, match="expected a threshold"):
    preferences.to_binary(record(scores=[1, 2]))


def test_pairs_made_from_a_ranking_rank_the_same():
  rng = np.random.default_rng(0)
  for _ in range(20):
    ranked = record(rank=rng.integers(1, 5, 6))
    matrix = np.full((6, 6), NAN)
    for (winner, loser), p in comparisons(ranked, "half").items():
      matrix[winner, loser] = p
    np.testing.assert_array_equal(
      preferences.to_ranking(record(prob=matrix)), preferences.to_ranking(ranked)
    )


# ---- labels that cannot be


BAD_LABELS = [
  ({"rank": [1, 2, 3]}, "rank: expected [2] for 2 images, got [3]"),
  ({"prob": [0.5, 0.5]}, "prob: expected [2, 2]"),
  ({"prob": [[NAN, 1.5], [NAN, NAN]]}, "prob: expected numbers from 0 to 1, got 1.5"),
  ({"prob": [[NAN, 1], [1, NAN]]}, "prob[i][j] + prob[j][i] to be 1"),
  ({"prob": [[0.5, NAN], [NAN, 0.5]]}, "only unknown ones"),
  ({"rank": [0, 1]}, "rank: expected numbers from 1, the best, up, got 0"),
  ({"rank": [NAN, NAN]}, "only unknown ones"),
  ({"binary": [1, 2]}, "binary: expected 1 good, 0 bad or -1 unknown, got 2"),
  ({"binary": [-1, -1]}, "only unknown ones"),
  ({"binary": [NAN, 1]}, "got nan"),
  ({"scores": [np.inf, 1]}, "scores: expected finite numbers, got inf"),
  ({}, "expected one label of prob, rank, binary, scores, got none"),
  ({"rank": [1, 2], "scores": [1, 2]}, "got rank and scores"),
]


@pytest.mark.parametrize("labels, expected", BAD_LABELS)
def test_a_record_refuses_a_label_that_does_not_fit(labels, expected):
  with pytest.raises(ValueError) as caught:
    record(n=2, **labels)
  assert expected in str(caught.value)


def test_a_record_needs_a_prompt_and_images():
  with pytest.raises(ValueError, match="expected a prompt"):
    record(prompt=" ", rank=[1, 2])
  with pytest.raises(ValueError, match="at least one image"):
    record(n=0, rank=[])


def test_a_share_of_votes_may_be_rounded():
  assert comparisons(record(prob=[[NAN, 0.667], [0.334, NAN]])).keys() == {(0, 1)}


# ---- odd images


def corners(image, **options):
  """The upper left and the lower right pixel of what `decode` makes of an image."""
  pixels = preferences.decode(encode(image, **options))
  assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
  return tuple(pixels[0, 0].tolist()), tuple(pixels[-1, -1].tolist())


def test_greyscale_and_black_and_white():
  assert corners(Image.new("L", (5, 4), 77)) == ((77,) * 3,) * 2
  assert corners(Image.new("1", (5, 4), 1)) == ((255,) * 3,) * 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
  values = np.array([[0, 257], [32896, 65535]], np.uint16)  # 257 i is i / 255 of the range
  pixels = preferences.decode(encode(Image.fromarray(values), kind))
  np.testing.assert_array_equal(pixels[..., 0], [[0, 1], [128, 255]])
  assert (pixels == pixels[..., :1]).all()


def test_transparent_pixels_show_white():
  image = Image.new("RGBA", (2, 1), (*RED, 255))
  image.putpixel((1, 0), (*RED, 0))
  assert corners(image) == (RED, (255, 255, 255))
  image.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black
  assert corners(image)[1] == (204, 204, 204)
  grey = Image.new("LA", (1, 1), (10, 0))
  assert corners(grey)[0] == (255, 255, 255)


def test_palettes_with_and_without_a_transparent_colour():
  image = Image.new("P", (2, 1))
  image.putpalette([*RED, *BLUE])
  image.putpixel((1, 0), 1)
  assert corners(image) == (RED, BLUE)
  assert corners(image, transparency=1) == (RED, (255, 255, 255))


def test_cmyk():
  (upper, _) = corners(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind="JPEG")
  assert np.abs(np.subtract(upper, RED)).max() < 8


def test_a_photo_taken_sideways_is_turned():
  image = Image.new("RGB", (6, 4), RED)
  image.putpixel((0, 3), BLUE)  # lower left, which a turn to the right brings to the upper left
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(image, exif=exif)
  assert preferences.make_candidate(data).size == (6, 4)
  assert tuple(preferences.decode(data)[0, 0]) == BLUE


def test_the_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED)]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert tuple(preferences.decode(data)[0, 0]) == GREEN


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"no image",
    encode(NOISE)[:-40],
    encode(NOISE)[:1500],
    encode(NOISE, "JPEG")[:-200],
    encode(NOISE, "WEBP", lossless=True)[:1000],
    encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
    encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"),
  ],
)
def test_broken_files_and_numbers_without_a_range_are_refused(data):
  with pytest.raises(ValueError, match="unreadable image: "):
    preferences.make_candidate(data)


def test_whatever_is_broken_in_a_file_is_one_kind_of_error():
  rng = np.random.default_rng(1)
  whole = np.frombuffer(encode(NOISE.resize((8, 8))), np.uint8)
  for _ in range(300):
    data = whole.copy()
    data[rng.integers(len(data), size=3)] = rng.integers(0, 256, 3)
    try:
      assert preferences.decode(data.tobytes()).dtype == np.uint8
    except ValueError as error:
      assert "unreadable image" in str(error)


# ---- reading


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
  records, report = preference_files.load(path)
  assert [r.prompt for r in records] == ["ein Bär", "b", "c", "d", "e"]
  np.testing.assert_array_equal(records[0].prob, [[NAN, 0], [1, NAN]])
  np.testing.assert_array_equal(records[1].prob, [[NAN, 0.75], [0.25, NAN]])
  np.testing.assert_array_equal(records[2].rank, [2, 1, NAN])
  np.testing.assert_array_equal(records[3].binary, [1])
  np.testing.assert_array_equal(records[4].scores, [-1.5, 2])
  for r in records:
    colours = [tuple(c.pixels()[0, 0].tolist()) for c in r.candidates]
    assert colours == [RED, BLUE, RED][: len(colours)]
    assert all(c.size == (4, 6) for c in r.candidates)
  assert report == preference_files.Report(str(path), 5, ())
  assert report.summary() == f"{path}: 5 of 5 rows read"


def test_parquet_may_hold_the_images_themselves(tmp_path):
  rows = [{"prompt": str(i), "images": [solid(RED), solid(BLUE)], "label_0": 1} for i in range(600)]
  records, _ = preference_files.load(write_parquet(tmp_path, rows))
  assert [r.prompt for r in records] == [str(i) for i in range(600)]  # more than one read
  assert tuple(records[-1].candidates[1].pixels()[0, 0]) == BLUE
  assert b"PNG" not in repr(records[-1]).encode()


def test_windows_files_and_blank_lines(folder):
  path = folder / "pairs.jsonl"
  line = json.dumps({**GOOD, "prompt": "a\u2028b"}, ensure_ascii=False).encode()
  path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
  records, _ = preference_files.load(path)
  assert [r.prompt for r in records] == ["a\u2028b"] * 2


BAD_ROWS = [
  (b"{", "not JSON", "not JSON: "),
  (b'"a cat"', "not JSON", "expected a JSON object, found a str"),
  (b'{"prompt": "\xe4"}', "not JSON", "utf-8"),
  (b"[" * 100_000, "not JSON", "not JSON"),
  ({**GOOD, "prompt": " "}, "no prompt", 'a text "prompt"'),
  ({**GOOD, "prompt": 3}, "no prompt", 'a text "prompt"'),
  ({"images": PATHS, "label_0": 1}, "no prompt", 'a text "prompt"'),
  ({**GOOD, "images": []}, "no images", 'a list "images"'),
  ({**GOOD, "images": "images/0.png"}, "no images", 'a list "images"'),
  ({**GOOD, "images": [PATHS[0], 3]}, "no images", "paths or bytes, found a int"),
  ({**GOOD, "images": [PATHS[0], "b.png"]}, "missing image", "b.png"),
  ({**GOOD, "images": [PATHS[0], "images"]}, "missing image", "images"),
  ({**GOOD, "images": [PATHS[0], "x" * 5000]}, "missing image", "xxx"),
  ({**GOOD, "images": [PATHS[0], "bad.png"]}, "unreadable image", "bad.png"),
  ({"prompt": "a", "images": PATHS}, "no label", "one of label_0, prob, rank, binary, scores"),
  ({**GOOD, "rank": [1, 2]}, "bad label", "found label_0 and rank"),
  ({**GOOD, "images": PATHS[:1]}, "bad label", "label_0: expected two images, got 1"),
  ({**GOOD, "label_0": 2}, "bad label", "from 0 to 1, got 2"),
  ({**GOOD, "label_0": "first"}, "bad label", "first"),
  ({**GOOD, "label_0": [1]}, "bad label", "list"),
  ({"prompt": "a", "images": PATHS, "rank": [1]}, "bad label", "rank: expected [2]"),
  ({"prompt": "a", "images": PATHS, "rank": [0, 1]}, "bad label", "got 0"),
  ({"prompt": "a", "images": PATHS, "rank": 1}, "bad label", "rank: expected [2]"),
  ({"prompt": "a", "images": PATHS, "prob": [[None, 1], [0]]}, "bad label", "inhomogeneous"),
  ({"prompt": "a", "images": PATHS, "scores": [10**400, 0]}, "bad label", "too large"),
  ({"prompt": "a", "images": PATHS, "scores": [NAN, None]}, "bad label", "only unknown"),
]


@pytest.mark.parametrize("row, reason, detail", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_set_aside_and_named(folder, row, reason, detail):
  (folder / "bad.png").write_bytes(encode(NOISE)[:1500])
  path = write_jsonl(folder, [GOOD, b"", row, GOOD])
  records, report = preference_files.load(path, max_bad_fraction=0.5)
  assert len(records) == 2 and report.num_rows == 3
  (bad,) = report.bad
  assert (bad.row, bad.reason) == (3, reason)  # the blank line counts, as in an editor
  assert detail in bad.detail


def test_bad_rows_of_parquet(tmp_path):
  images = [solid(RED), solid(BLUE)]
  rows = [{"prompt": f"p{i}", "images": images, "label_0": i % 2} for i in range(300)]
  rows[100]["prompt"] = None
  rows[280] = {**rows[280], "images": [images[0], b"no image"]}
  records, report = preference_files.load(write_parquet(tmp_path, rows))
  assert len(records) == 298
  assert [(b.row, b.reason) for b in report.bad] == [(101, "no prompt"), (281, "unreadable image")]


def test_the_report_can_be_written(folder):
  rows = [GOOD] * 3 + [{**GOOD, "images": ["x.png"]}, b"{", {**GOOD, "images": ["y.png"]}]
  _, report = preference_files.load(write_jsonl(folder, rows), max_bad_fraction=0.5)
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
    preference_files.load(source, **options)
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
  assert len(preference_files.load(path, max_bad_fraction=0.6)[0]) == 4


def test_no_good_row_is_an_error_whatever_is_allowed(folder):
  assert "0 of 1 rows read" in error_of(write_jsonl(folder, [b"{"]), max_bad_fraction=1.0)


def test_files_that_cannot_be_read(tmp_path):
  assert "found no such file" in error_of(tmp_path / "no.jsonl")
  assert "found no such file" in error_of(tmp_path)
  (tmp_path / "pairs.csv").write_text("prompt")
  assert ".jsonl or .parquet" in error_of(tmp_path / "pairs.csv")
  assert "is empty" in error_of(write_jsonl(tmp_path, [b""]))
  assert "max_bad_fraction: expected a share" in error_of(tmp_path, max_bad_fraction=2)


def test_parquet_files_that_cannot_be_read(tmp_path):
  path = write_parquet(tmp_path, [{"caption": "a cat", "jpg_0": b""}])
  assert 'columns "prompt" and "images", found caption, jpg_0' in error_of(path)
  path = write_parquet(tmp_path, [{"prompt": str(i), "images": [solid(RED)]} for i in range(9)])
  content = path.read_bytes()
  for broken in (b"", content[:-20], content[:8] + bytes(200) + content[208:]):
    path.write_bytes(broken)
    assert "no whole parquet file" in error_of(path)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "pairs.parquet").touch()
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert 'pip install "jaxalign[data]"' in error_of(tmp_path / "pairs.parquet")


# ---- batches


def make_pairs(num_records, **options):
  """One pair a record, in which the second image of even records won."""
  ranks = ([2, 1], [1, 2])
  records = [record(prompt=f"p{i}", rank=ranks[i % 2]) for i in range(num_records)]
  return preference_pairs.PreferencePairs(records, **{"size": (4, 6), **options})


def test_pairs_of_all_records_with_the_winner_first():
  records = [
    record(prompt="a", rank=[2, 3, 1]),
    record(prompt="b", prob=[[NAN, 0.5], [0.5, NAN]]),
    record(prompt="c", prob=[[NAN, 0.25], [0.75, NAN]]),
  ]
  pairs = preference_pairs.PreferencePairs(records, size=(4, 6))
  assert pairs.prompts == ["a", "a", "a", "c"] and len(pairs) == 4
  np.testing.assert_allclose(pairs.p, [1, 1, 1, 0.75])
  np.testing.assert_allclose(pairs.weight, [1 / 3, 1 / 3, 1 / 3, 1])
  images = pairs.images(np.array([3, 0, 1, 2, 3], np.int32))
  assert images.shape == (5, 2, 4, 6, 3) and images.dtype == np.uint8
  # The grey of an image is its index.
  assert images[:, :, 0, 0, 0].tolist() == [[1, 0], [0, 1], [2, 0], [2, 1], [1, 0]]
  with_ties = preference_pairs.PreferencePairs(records, size=(4, 6), ties="half")
  assert with_ties.prompts == ["a", "a", "a", "b", "c"] and with_ties.p[3] == 0.5


def test_records_without_any_pair_are_an_error():
  with pytest.raises(ValueError, match='none of 1 records has one with ties="drop"'):
    preference_pairs.PreferencePairs([record(rank=[1, 1])], size=(4, 6))


def test_images_of_another_size_are_refused_or_resized(tmp_path):
  small = preferences.make_candidate(solid(RED))
  large = preferences.make_candidate(solid(BLUE, (8, 8)))
  label = preferences.Record("a", (small, large), rank=np.array([1.0, 2.0]))
  with pytest.raises(ValueError, match=r"\(4, 6\), found one of \(8, 8\); .*resize=True"):
    preference_pairs.PreferencePairs([label], size=(4, 6))
  pairs = preference_pairs.PreferencePairs([label], size=(4, 6), resize=True)
  images = pairs.images(np.array([0]))
  assert images.shape == (1, 2, 4, 6, 3)
  assert (images[0, 0] == RED).all() and (images[0, 1] == BLUE).all()


def test_an_image_that_changed_after_reading_is_noticed(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(solid(RED))
  candidates = (preferences.make_candidate(path),) * 2
  label = preferences.Record("a", candidates, scores=np.array([1.0, 2.0]))
  pairs = preference_pairs.PreferencePairs([label], size=(4, 6))
  path.write_bytes(solid(RED, (4, 7)))
  with pytest.raises(ValueError, match=r"found one of \(4, 7\)"):
    pairs.images(np.array([0]))
  path.unlink()
  with pytest.raises(ValueError, match=r"unreadable image.*a\.png"):
    pairs.images(np.array([0]))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, 25])
def test_every_epoch_shows_every_pair_once(batch_size):
  pairs = make_pairs(10)
  steps = 60 // batch_size + 1
  rows = np.concatenate([pairs.draw_for_step(0, step, batch_size) for step in range(steps)])
  assert rows.dtype == np.int32 and len(rows) == steps * batch_size
  epochs = rows[:60].reshape(6, 10)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6  # each in another order


def test_a_draw_is_a_function_of_seed_and_step():
  pairs = make_pairs(40)
  late = pairs.draw_for_step(3, 7, 16)  # asked for first, so nothing earlier can matter
  first = pairs.draw_for_step(3, 0, 16)
  np.testing.assert_array_equal(make_pairs(40).draw_for_step(3, 7, 16), late)
  np.testing.assert_array_equal(pairs.draw_for_step(3, 0, 16), first)
  for seed, step in ((3, 1), (4, 0)):
    assert (pairs.draw_for_step(seed, step, 16) != first).mean() > 0.5


@pytest.mark.parametrize("process_count", [2, 3, 4, 12])
def test_processes_share_the_batch_of_one(process_count):
  pairs = make_pairs(10)
  for step in range(4):
    parts = [pairs.draw_for_step(5, step, 12, k, process_count) for k in range(process_count)]
    assert {len(part) for part in parts} == {12 // process_count}
    np.testing.assert_array_equal(np.concatenate(parts), pairs.draw_for_step(5, step, 12))


@pytest.mark.parametrize(
  "arguments", [(0, -1, 4), (0, 0, 0), (0, 0, 4, 0, 3), (0, 0, 4, 2, 2), (0, 0, 4, -1, 2)]
)
def test_a_draw_that_cannot_be(arguments):
  with pytest.raises(ValueError, match=r"expected (step|a batch)"):
    make_pairs(4).draw_for_step(*arguments)


def test_the_order_of_an_epoch_is_not_biased():
  pairs = make_pairs(4)
  firsts = collections.Counter(int(pairs.draw_for_step(0, 4 * e, 1)[0]) for e in range(800))
  # Each leads with probability 1/4: expected 200, standard deviation sqrt(800 * 3) / 4 = 12.2.
  assert all(abs(firsts[row] - 200) < 5 * 12.2 for row in range(4))
