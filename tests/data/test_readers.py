"""Readers: the same prompts from every format, and what is said of files that are none."""

import bz2
import csv
import gzip
import io
import json
import lzma
import types
import zipfile

import pytest

from jaxalign.data import records
from jaxalign.data.readers import arrow

PROMPTS = ["a fox in the snow", "two red boats,\none of them small", 'a sign that says "stop"']
ROWS = [{"prompt": prompt, "category": "any"} for prompt in PROMPTS]


def delimited(rows, delimiter=","):
  buffer = io.StringIO(newline="")
  writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
  writer.writeheader()
  writer.writerows(rows)
  return buffer.getvalue().encode()


def columns_of(rows):
  return pytest.importorskip("pyarrow").table({name: [r[name] for r in rows] for name in rows[0]})


def parquet(rows):
  table, buffer = columns_of(rows), io.BytesIO()
  from pyarrow import parquet

  parquet.write_table(table, buffer)
  return buffer.getvalue()


def arrow_stream(rows):
  table, buffer = columns_of(rows), io.BytesIO()
  from pyarrow import ipc

  with ipc.new_stream(buffer, table.schema) as writer:
    writer.write_table(table)
  return buffer.getvalue()


def arrow_file(rows):
  table, buffer = columns_of(rows), io.BytesIO()
  from pyarrow import feather

  feather.write_feather(table, buffer)
  return buffer.getvalue()


def lines(rows):
  return "\n".join(map(json.dumps, rows)).encode()


FORMATS = {
  "p.jsonl": lines,
  "p.ndjson": lines,
  "p.json": lambda rows: json.dumps(rows, indent=1).encode(),
  "lines.json": lines,
  "columns.json": lambda rows: json.dumps({n: [r[n] for r in rows] for n in rows[0]}).encode(),
  "nested.json": lambda rows: json.dumps({"version": 2, "data": rows}).encode(),
  "p.csv": delimited,
  "p.tsv": lambda rows: delimited(rows, "\t"),
  "p.parquet": parquet,
  "p.PARQUET": parquet,
  "p.arrow": arrow_stream,
  "p.feather": arrow_file,
}
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def error_of(folder, name, content, **options):
  with pytest.raises(ValueError) as caught:
    records.load(write(folder, name, content), **options)
  message = str(caught.value)
  assert message.startswith("records: ") and len(message.splitlines()) <= 3
  assert len(message) < 1000
  return message


@pytest.mark.parametrize("packed", ["", *PACKERS])
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_come_from_every_format(name, packed, tmp_path):
  content = PACKERS.get(packed, bytes)(FORMATS[name](ROWS))
  assert records.load(write(tmp_path, name + packed, content)).records == tuple(ROWS)


@pytest.mark.parametrize("name", ["p.txt", "p.TXT", "p", "p.txt.gz", "p.gz"])
def test_texts(name, tmp_path):
  content = "\ufeffa cat\r\n[1girl], {red|blue} hair\n[a (cat:1.2)]".encode()
  found = records.load(
    write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
  )
  prompts = [record["prompt"] for record in found.records]
  assert prompts == ["a cat", "[1girl], {red|blue} hair", "[a (cat:1.2)]"]


@pytest.mark.parametrize("line", [
  "[1girl], a", "[[blurry]] fox", "{red|blue} fox", "[{red|blue} fox]", '"G O" in paint', "[a]",
  '["GO" in paint]', "a: {b}", "[]", "<lora:a:1>", "# a",
])  # fmt: skip
def test_signs_that_prompts_begin_with(line, tmp_path):
  assert records.load(write(tmp_path, "p.txt", line)).records == ({"prompt": line},)


@pytest.mark.parametrize("content", [PROMPTS, {"prompts": PROMPTS}, {"a": 1, "x": PROMPTS}])
def test_json_of_texts(content, tmp_path):
  """huggingface/datasets#6695, #6913: a list of texts, by itself or in a field."""
  found = records.load(write(tmp_path, "p.json", json.dumps(content)))
  assert [record["prompt"] for record in found.records] == PROMPTS


def test_one_record_of_numbers_is_not_columns(tmp_path):
  record = {"start": [-0.9, 0.1], "goal": [0.9, 0.2]}
  assert records.load(write(tmp_path, "p.json", json.dumps(record))).records == (record,)


@pytest.mark.parametrize("name", ["Prompt", "text", "CAPTION", " caption "])
@pytest.mark.parametrize("kind", ["p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet"])
def test_the_column_of_prompts_by_its_other_names(name, kind, tmp_path):
  rows = [{name: prompt, "id": "7"} for prompt in PROMPTS]
  found = records.load(write(tmp_path, kind, FORMATS[kind](rows)))
  assert found.records == tuple({"prompt": prompt, "id": "7"} for prompt in PROMPTS)


def test_several_columns_of_texts_are_asked_about(tmp_path):
  rows = [{"Text": "x", "caption": "a cat"}]
  for kind in ("p.csv", "p.jsonl", "p.parquet"):
    message = error_of(tmp_path, kind, FORMATS[kind](rows))
    assert 'expected one column "prompt", found Text, caption' in message
    assert '"prompt=NAME"' in message and "config.data.columns" in message
    found = records.load(str(tmp_path / kind), "prompt=caption")
    assert found.records == ({"Text": "x", "prompt": "a cat"},)
  assert records.load(
    write(tmp_path, "q.csv", delimited([{"text": "x", "prompt": "a cat"}]))
  ).records == ({"text": "x", "prompt": "a cat"},)


def test_a_list_with_a_text_that_begins_with_quotes(tmp_path):
  """google-research/parti: line 1562 of PartiPrompts.tsv is no quoted cell."""
  text = 'Prompt\tCategory\tChallenge\tNote\n"G O" in paint\tWriting\tStyle\t\na cat\tAnimals\t\t\n'
  path = write(tmp_path, "PartiPrompts.tsv", text)
  assert [r["prompt"] for r in records.load(path).records] == ['"G O" in paint', "a cat"]
  named = records.load(path, "parti_prompts").records
  assert named[1] == {"prompt": "a cat", "category": "Animals"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.tsv"])
def test_ends_of_lines(name, end, tmp_path):
  """Of Unix, of Windows, and of old Macs."""
  before, after = {"p.txt": ("", ""), "p.jsonl": ('{"prompt": "', '"}')}.get(name, ("", ""))
  header = [] if name in ("p.txt", "p.jsonl") else ["prompt"]
  content = end.join([*header, *(f"{before}{prompt}{after}" for prompt in ("a cat", "a dog")), ""])
  found = records.load(write(tmp_path, name, content.encode())).records
  assert found == ({"prompt": "a cat"}, {"prompt": "a dog"})


def test_what_excel_writes(tmp_path):
  """UKGovernmentBEIS/inspect_ai#5474: the mark of UTF-8 is no part of the first column's name."""
  content = '\ufeffprompt,note\r\n"a, b\nc",\r\n\r\nd,x\r\n'
  found = records.load(write(tmp_path, "p.csv", content)).records
  assert found == ({"prompt": "a, b\nc"}, {"prompt": "d", "note": "x"})


def test_of_a_table_only_plain_values_are_kept(tmp_path):
  rows = [{"prompt": "a", "jpg": b"x", "seed": 3, "score": float("nan"), "tags": ["u"], "no": None}]
  path = write(tmp_path, "p.parquet", parquet(rows))
  assert records.load(path).records == ({"prompt": "a", "seed": 3, "tags": ["u"]},)


def zipped():
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    file.writestr("p.txt", "a cat")
  return buffer.getvalue()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
REFUSED = [
  ("p.yaml", "- a cat", r"ends in .txt, .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
  ("p.md", "a cat", "ends in .txt"),
  ("p.zip", zipped(), "unpack the archive"),
  ("p.tar.gz", gzip.compress(b"x"), "unpack the archive"),
  ("p.txt", zipped(), "found a zip archive"),
  ("p", b"PAR1\x15\x04\x15\x00PAR1", "found a parquet file; let its name end in .parquet"),
  ("p.csv", gzip.compress(b"prompt\na"), "packed with gzip; let its name end in .gz"),
  ("p.txt", b"\x89PNG\r\n\x1a\n", "found a picture"),
  # policy-gradient/GRPO-Zero#1: cloned without git-lfs.
  ("p.parquet", POINTER, "found a pointer of git-lfs; fetch the file: git lfs pull"),
  ("p.txt", POINTER, "git lfs pull"),
  ("p.jsonl", "<!DOCTYPE html><html>", "found a web page"),
  ("p.txt.gz", "a cat", "no whole .gz file"),
  ("p.txt.xz", lzma.compress(b"a cat" * 99)[:-9], "no whole .xz file"),
  ("p.txt", '[\n "a cat"\n]', "found JSON; let its name end in .json"),
  ("p.txt", '{"prompt": "a cat"}\n', "found JSON"),
  ("p", '["a cat"]["a dog"]', "found JSON"),
  ("p.txt", 'a cat\n{"prompt": "a cat"}\n', "found JSON"),
  ("p.txt", "a\0 \0c\0a\0t\0", "iconv -f utf-16"),
  ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}', "line 2: not UTF-8 (byte 12)"),
  ("p.jsonl", b'{"prompt": "\\ud83d"}', "half a character"),
  ("p.json", "[1, 2]", "row 1: expected a JSON object, found a int"),
  ("p.json", '{"0": {"prompt": "a"}}', "found an object of '0'"),
  ("p.json", '{"a": ["x"], "b": ["x", "y"]}', "columns of one length"),
  ("p.json", '{"anime": ["a"], "photo": ["b"]}', 'a column "prompt", found anime, photo'),
  ("p.jsonl", '{"title": "a"}', 'line 1: expected a column "prompt", found title'),
  ("p.json", '["a",', "is not JSON: line 1"),
  ("p.json", "[" * 100_000, "is not JSON"),
  ("p.csv", "prompt,n\na cat, black,2\n", "line 2: expected 2 cells as in the header, found 3"),
  ("p.csv", "prompt;n\na;2\n", 'expected a column "prompt", found prompt;n'),
  ("p.csv", "prompt,prompt\na,b\n", "found several: prompt"),
  ("p.csv", 'prompt\n"a cat\n', "found at line 2"),
  ("p.csv", "prompt,n\n,2\n", 'line 2: expected "prompt" to be a text'),
  ("p.csv", "", "holds none"),
  ("p.json", "[]", "holds none"),
  ("p.parquet", b"", "no whole parquet file"),
  ("p.arrow", b"ARROW1\0\0", "no whole Arrow file"),
]


@pytest.mark.parametrize("name, content, expected", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_read_is_refused_by_name(name, content, expected, tmp_path):
  if name.endswith((".parquet", ".arrow")):
    pytest.importorskip("pyarrow")
  assert expected in error_of(tmp_path, name, content)


def test_what_python_does_not_unpack_is_refused_by_name(tmp_path):
  from jaxalign.data.readers import contents

  if ".zst" not in contents.PACKED:
    assert "zstd -d" in error_of(tmp_path, "p.txt.zst", b"\x28\xb5\x2f\xfd")


def test_numbers_that_pyarrow_would_believe_are_looked_at(tmp_path):
  """Each of these ended the process: places beyond the memory, and fewer rows than none."""
  content = arrow_stream([{"prompt": "abc"}, {"prompt": "defgh"}])
  places = b"".join(k.to_bytes(4, "little") for k in (0, 3, 8))
  assert content.count(places) == 1
  broken = content.replace(places, places[:8] + b"\xff\xff\xff\x7f")
  assert "no whole Arrow file" in error_of(tmp_path, "p.arrow", broken)
  groups = [types.SimpleNamespace(num_rows=-3), types.SimpleNamespace(num_rows=3)]
  metadata = types.SimpleNamespace(num_rows=0, num_row_groups=2, row_group=groups.__getitem__)
  with pytest.raises(ValueError, match=r"expected 0 rows, found groups of \[-3, 3\]"):
    arrow._check_counts(metadata)
