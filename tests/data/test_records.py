"""Record sets: every way a file can be wrong, and a draw that is balanced and reproducible."""

import collections
import json

import numpy as np
import pytest

from jaxalign.data import records as records_lib


def write(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def error_of(source):
  with pytest.raises(ValueError) as caught:
    records_lib.load(source)
  message = str(caught.value)
  assert message.startswith("records: ") and len(message.splitlines()) <= 3
  return message


# ---- reading


def test_a_text_file_has_one_prompt_a_line(tmp_path):
  loaded = records_lib.load(write(tmp_path, "p.txt", "a cat\r\n\n  two dogs \n\t\na bird"))
  assert loaded.records == ({"prompt": "a cat"}, {"prompt": "two dogs"}, {"prompt": "a bird"})
  assert len(loaded) == 3
  assert loaded[np.array([2, 0, 2], np.int32)] == [loaded.records[i] for i in (2, 0, 2)]


def test_json_lines_keep_their_other_fields(tmp_path):
  rows = [{"prompt": "a cat", "category": "x", "count": 2}, {"prompt": "ein Bär"}]
  text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
  assert records_lib.load(write(tmp_path, "p.jsonl", text)).records == tuple(rows)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_separators_inside_a_text_do_not_end_its_line(tmp_path, name):
  prompt = "a\u2028b\x85c\u2029d"  # all three are line ends to str.splitlines
  line = json.dumps({"prompt": prompt}, ensure_ascii=False) if name == "p.jsonl" else prompt
  assert records_lib.load(write(tmp_path, name, line + "\n")).records == ({"prompt": prompt},)


@pytest.mark.parametrize("name, line", [("p.txt", "a cat"), ("p.jsonl", '{"prompt": "a cat"}')])
def test_the_mark_that_windows_puts_first_is_no_part_of_the_prompt(tmp_path, name, line):
  loaded = records_lib.load(write(tmp_path, name, b"\xef\xbb\xbf" + line.encode()))
  assert loaded.records == ({"prompt": "a cat"},)


@pytest.mark.parametrize("source", [n for n in records_lib.NAMED if n.startswith("shapes")])
def test_the_sets_of_the_embedded_world(source):
  records = records_lib.load(source).records
  assert {"single_object", "counting", "position"} <= {record["category"] for record in records}
  assert len({record["prompt"] for record in records}) == len(records) > 50


def test_training_and_held_out_prompts_do_not_meet():
  train, held_out = (records_lib.load(f"shapes/{split}") for split in ("train", "held_out"))
  assert not {r["prompt"] for r in train.records} & {r["prompt"] for r in held_out.records}


def test_held_out_prompts_are_those_of_validation_and_test():
  held_out, validation, test = (
    {r["prompt"] for r in records_lib.load(f"shapes/{split}").records}
    for split in ("held_out", "validation", "test")
  )
  assert validation | test == held_out and not validation & test


def numbered(*numbers):
  return records_lib.RecordSet(tuple({"prompt": f"Prompt {n}", "category": "c"} for n in numbers))


def test_a_set_is_split_by_its_texts_a_third_for_validation():
  whole = numbered(*range(300))
  validation, test = records_lib.split(whole)
  assert 80 <= len(validation) <= 120 and len(validation) + len(test) == 300
  assert not set(map(str, validation.records)) & set(map(str, test.records))
  assert validation.records == tuple(r for r in whole.records if r in validation.records)
  # Whatever else is in the file, and however a prompt is written, it stays on its side.
  fewer, _ = records_lib.split(numbered(*range(250, 20, -1)))
  assert {r["prompt"] for r in fewer.records} < {r["prompt"] for r in validation.records}
  again = records_lib.RecordSet((*test.records, {"prompt": "  PROMPT  3 "}, {"prompt": "prompt 3"}))
  sides = [sum(r["prompt"].split()[-1] == "3" for r in side.records) for side in records_lib.split(
    records_lib.RecordSet((*again.records, *validation.records))
  )]  # fmt: skip
  assert sorted(sides) == [0, 3]


def test_a_set_that_leaves_a_side_empty_is_refused():
  with pytest.raises(ValueError, match=r"enough to split .* found 1, which give [01] and [01]"):
    records_lib.split(numbered(1))


# ---- what a user can get wrong


@pytest.mark.parametrize("source", ["nowhere.txt", "shapes/tests", "", "shapes"])
def test_no_such_set_or_file(source, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert "shapes/held_out" in error_of(source) and f'"{source}"' in error_of(source)


def test_an_empty_folder(tmp_path):
  assert "found no file to read in the folder" in error_of(str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_an_empty_file(tmp_path, name, content):
  assert "p." in error_of(write(tmp_path, name, content))
  assert "holds none" in error_of(write(tmp_path, name, content))


def test_a_file_in_another_encoding(tmp_path):
  message = error_of(write(tmp_path, "p.txt", "a cat\nein Bär".encode("latin-1")))
  assert "not UTF-8 (byte 11)" in message and "iconv" in message


@pytest.mark.parametrize(
  "line, expected",
  [
    ('{"prompt": "a"', "line 3: not JSON"),
    ("a cat", "line 3: not JSON"),
    ('{"prompt": 3}', 'line 3: expected "prompt" to be a text'),
    ('{"prompt": "  "}', 'line 3: expected "prompt" to be a text'),
    ('["a"]', 'line 3: expected a JSON object, found a list'),
    ('{"prompt": "a", "category": ["x"]}', 'line 3: expected "category" to be a text'),
    ('{"prompt": "a", "category": null}', 'line 3: expected "category" to be a text'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, expected):
  text = f'{{"prompt": "fine"}}\n\n{line}\n{{"prompt": "fine"}}\n'
  assert expected in error_of(write(tmp_path, "p.jsonl", text))


# ---- drawing


def make(**sizes):
  """A set with this many prompts of each category."""
  return records_lib.RecordSet(
    tuple({"prompt": f"{c}{i}", "category": c} for c, n in sizes.items() for i in range(n))
  )


def categories_of(loaded, ids):
  return collections.Counter(record["category"] for record in loaded[ids])


@pytest.mark.parametrize("num_records", [1, 2, 3, 7, 30])
def test_categories_are_balanced_to_within_one(num_records):
  loaded = make(a=50, b=2, c=9)
  ids = loaded.draw(np.random.default_rng(0), num_records)
  assert ids.shape == (num_records,) and ids.dtype == np.int32
  counts = [categories_of(loaded, ids)[c] for c in "abc"]
  assert sum(counts) == num_records and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("num_records", [2, 5])
def test_no_category_is_preferred_when_they_do_not_divide(num_records):
  loaded = make(a=5, b=5, c=5)
  total = collections.Counter()
  for step in range(600):
    total += categories_of(loaded, loaded.draw_for_step(0, step, num_records))
  # The odd one out is uniform: expected 200 n, standard deviation sqrt(600 * 2 / 9) = 11.5.
  assert all(abs(total[c] - 200 * num_records) < 5 * 11.5 for c in "abc")


def test_without_replacement_until_a_category_is_used_up():
  loaded = make(a=4, b=10)
  for seed in range(5):
    ids = loaded.draw(np.random.default_rng(seed), 20)  # ten of each
    counts = collections.Counter(ids.tolist())
    assert sorted(counts[i] for i in range(4)) == [2, 2, 3, 3]  # ten from four
    assert all(counts[i] == 1 for i in range(4, 14))


def test_prompts_without_a_category_are_one_category():
  loaded = records_lib.RecordSet(tuple({"prompt": str(i)} for i in range(8)))
  assert sorted(loaded.draw(np.random.default_rng(0), 8).tolist()) == list(range(8))


def test_a_draw_is_a_function_of_seed_and_step():
  loaded = make(a=40, b=40)
  first = loaded.draw_for_step(3, 5, 16)
  np.testing.assert_array_equal(first, loaded.draw_for_step(3, 5, 16))
  for seed, step in ((3, 6), (4, 5), (5, 3)):
    assert (first != loaded.draw_for_step(seed, step, 16)).mean() > 0.5


def test_every_prompt_is_drawn_sooner_or_later():
  loaded = make(a=7, b=3)
  seen = {int(i) for step in range(60) for i in loaded.draw_for_step(0, step, 2)}
  assert seen == set(range(10))
