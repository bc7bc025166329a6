"""Data files changed at random, and what may come of it: success, or an error of a few lines."""

import bz2
import copy
import gzip
import hashlib
import io
import json
import lzma

import pyarrow
import pyarrow.parquet

LONGEST = 1500  # characters of an error
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".PARQUET", ".JSONL")
OTHERS = ("", ".yaml", ".gz", ".zip", ".txt.gz", ".jsonl.xz", ".csv.bz2", ".json.zst", ".Txt")
NAMES = ("prompt", "Prompt", "text", "caption", "images", "samples", "label_0", "rank", "", "é")
# Values of other types, and such as no field may have.
VALUES = (
  None, "", " ", 0, 1, -1, 2, 0.5, float("nan"), float("inf"), 10**30, True, "a cat", "a.png", [],
  ["a.png"], [None, None], [[0.5], [1]], {}, {"bytes": None, "path": "a.png"}, {"path": None},
  {"a": {"b": [1]}}, "\ud800", "x" * 5000, "a\nb", "a\tb", '"', "http://a/b.png", "\0",
)  # fmt: skip


def rename(rng, rows):
  old, new = rng.choice(sorted(rows[0])), str(rng.choice(NAMES))
  return [{new if name == old else name: value for name, value in row.items()} for row in rows]


def drop(rng, rows):
  name = rng.choice(sorted(rows[0]))
  return [{key: value for key, value in row.items() if key != name} for row in rows]


def retype(rng, rows):
  """Of one row, or of all."""
  name, value = rng.choice(sorted(rows[0])), VALUES[rng.integers(len(VALUES))]
  which = range(len(rows)) if rng.random() < 0.3 else [rng.integers(len(rows))]
  for place in which:
    rows[place][name] = value
  return rows


def add(rng, rows):
  rows[rng.integers(len(rows))][str(rng.choice(NAMES))] = VALUES[rng.integers(len(VALUES))]
  return rows


def repeat(rng, rows):
  return rows * int(rng.integers(0, 3))


OF_ROWS = (rename, drop, retype, retype, add, repeat)


def truncate(rng, content):
  return content[: rng.integers(len(content) + 1)]


def flip(rng, content):
  found = bytearray(content)
  for at in rng.integers(0, len(found), size=rng.integers(1, 6)) if found else ():
    found[at] = rng.integers(256)
  return bytes(found)


def insert(rng, content):
  parts = (b"\xef\xbb\xbf", b"\0", b"\n", b'"', b"\xff\xfe", b"[", b"}", b",", b"\r")
  at = 0 if rng.random() < 0.3 else rng.integers(len(content) + 1)
  return content[:at] + parts[rng.integers(len(parts))] + content[at:]


def twice(rng, content):
  return content + content


def recode(rng, content):
  return content.decode("utf-8", "replace").encode(str(rng.choice(["utf-16", "utf-16-le"])))


def pack(rng, content):
  return (gzip.compress, bz2.compress, lzma.compress)[rng.integers(3)](content)


OF_BYTES = (truncate, flip, flip, insert, twice, recode, pack)


def encode(rows, suffix):
  """Rows as the content of a file; what a format cannot hold is written as text in it."""
  if suffix == ".txt":
    return "\n".join(str(row.get("prompt")) for row in rows).encode("utf-8", "replace")
  if suffix in (".csv", ".tsv"):
    return _delimited(rows, "," if suffix == ".csv" else "\t")
  if suffix == ".jsonl":
    return "\n".join(json.dumps(row, default=repr) for row in rows).encode()
  if suffix == ".json":
    return json.dumps(rows, default=repr).encode()
  buffer, table = io.BytesIO(), _arrow(rows)
  if suffix == ".parquet":
    pyarrow.parquet.write_table(table, buffer)
  else:
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
      writer.write_table(table)
  return buffer.getvalue()


def _delimited(rows, separator):
  names = list(dict.fromkeys(name for row in rows for name in row))
  cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
  quoted = ([f'"{cell}"' if separator in cell else cell for cell in row] for row in cells)
  return "\n".join(separator.join(row) for row in quoted).encode("utf-8", "replace")


def _arrow(rows):
  columns = {}
  for name in dict.fromkeys(name for row in rows for name in row):
    values = [row.get(name) for row in rows]
    try:
      columns[name] = pyarrow.array(values)
      if str(columns[name].type) == "struct<>":  # which parquet does not have
        raise ValueError
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
      texts = [str(value).encode("utf-8", "replace").decode() for value in values]
      columns[name] = pyarrow.array(texts)
  return pyarrow.table(columns)


def write(rng, rows, folder, suffixes):
  """A file with up to three changes to rows, bytes or name; and what to name as the source."""
  suffix = str(rng.choice(suffixes))
  rows = copy.deepcopy(rows)
  for _ in range(rng.integers(0, 3)):
    if rows and rows[0]:
      rows = OF_ROWS[rng.integers(len(OF_ROWS))](rng, rows)
  content = encode(rows, suffix)
  if rng.random() < 0.5:
    content = OF_BYTES[rng.integers(len(OF_BYTES))](rng, content)
  if rng.random() < 0.2:
    suffix = str(rng.choice([*SUFFIXES, *OTHERS]))
  path = folder / f"part{suffix}"
  path.write_bytes(content)
  kind = rng.random()
  if kind < 0.1:  # shards, one of them perhaps twice
    other = folder / f"part-2{suffix}"
    other.write_bytes(content)
    return [[path, other], [path, path], str(folder), str(folder / "*part*")][rng.integers(4)]
  return str(path)


def check(load, folder, source):
  """`load(source)`, None if it is refused as a user is to be told; no file may have changed."""
  before = digests(folder)
  try:
    return load(source)
  except (ValueError, OSError) as error:
    text = str(error)
    assert 1 <= len(text.splitlines()) <= 3 and len(text) <= LONGEST, text
    assert type(error) in (ValueError, OSError) or isinstance(error, OSError), repr(error)
  finally:
    assert digests(folder) == before
  return None


def digests(folder):
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.iterdir()
    if path.is_file()
  }


def clear(folder, kept=()):
  for path in folder.iterdir():
    if path.is_file() and path.name not in kept:
      path.unlink()
