"""Sources: which files are meant by a file, a folder, a pattern, or a list of these."""

import pathlib
import re

import pytest

from jaxalign.data import records, sources


@pytest.fixture
def folder(tmp_path):
  def make(*names):
    for name in names:
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_text(f"prompt of {name}")
    return tmp_path

  return make


def names(source):
  return [path.name for path in sources.find(source)]


SHARDS = ["part-1.txt", "part-2.txt", "part-10.txt"]


def test_shards_come_in_the_order_of_their_numbers(folder):
  """dask/dask#7248: by their letters, 10 is before 2."""
  made = folder(*reversed(SHARDS))
  assert names(made) == names(str(made)) == names(f"{made}/*.txt") == SHARDS
  assert names(f"{made}/part-?.txt") == SHARDS[:2]
  assert names(f"{made}/**/*.txt") == SHARDS
  texts = [record["prompt"] for record in records.load(str(made)).records]
  assert texts == [f"prompt of {name}" for name in SHARDS]


def test_a_list_keeps_its_order_and_may_name_folders_and_patterns(folder):
  made = folder(*SHARDS, "more/a.txt", "more/b.txt", "z.txt")
  source = [f"{made}/z.txt", made / "more", f"{made}/part-?.txt"]
  assert names(source) == names(tuple(source)) == ["z.txt", "a.txt", "b.txt", *SHARDS[:2]]
  assert len(records.load(source)) == 5


def test_of_a_folder_only_the_data_counts(folder):
  """apache/spark PR#1691: what the program that wrote the data left beside it."""
  made = folder(
    *("_SUCCESS", "_metadata.parquet", ".part-1.txt.crc", ".hidden.txt", "no_suffix", "README.md"),
    *("a.png", "inside/c.txt", "state.json", "README.txt", "a.txt", "b.TXT"),
  )
  assert names(made) == names(f"{made}/?.[tT]*") == ["a.txt", "b.TXT"]
  assert records.load(made / "no_suffix").records == ({"prompt": "prompt of no_suffix"},)


def test_a_name_with_signs_of_a_pattern_is_a_file_if_there_is_one(folder):
  made = folder("a[1].txt", "a1.txt")
  assert names(f"{made}/a[1].txt") == ["a[1].txt"]
  assert names(f"{made}/a[12].txt") == ["a1.txt"]


@pytest.mark.parametrize("made, source, expected", [
  ([], "", r'no file to read in the folder "\S+", only nothing'),
  (["a.png", "data/a.txt"], "", "only a.png, data/"),
  ([], "*.txt", r'no file that matches "\S+\*\.txt"'),
  (["_a.txt"], "*.txt", "no file that matches"),
  ([], "a.txt", "no such file"),
  (["a.txt", "b.jsonl"], "", r"files of one kind .* found \*\.txt, \*\.jsonl\nname some of them"),
  # As most sets on the hub are stored: who names the folder would train on the test.
  (["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"], "", "found test, train\nname one"),
  (["val.txt", "my_train.txt"], "", "found train, validation"),
  (["a.txt", "a.txt.gz"], "", 'each file once, packed or not, found "'),
], ids=range(9))  # fmt: skip
def test_what_is_not_known_is_asked(made, source, expected, folder):
  with pytest.raises(ValueError, match=expected) as caught:
    records.load(str(folder(*made) / source))
  message = str(caught.value)
  assert message.startswith("records: ") and len(message.splitlines()) <= 3
  missing = isinstance(caught.value.__cause__, sources.NotFoundError)
  assert ("shapes/held_out" in message) == missing


@pytest.mark.parametrize("source", [3, None, [], {}, b"a.txt", [3], [["a.txt"]]])
def test_what_is_no_source(source):
  with pytest.raises(ValueError, match=r"expected a (file|list)"):
    sources.find(source)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "?" * 3000, "[" * 5000])
def test_names_that_no_file_can_have(source):
  with pytest.raises(ValueError, match="found no") as caught:
    sources.find(source)
  assert len(str(caught.value)) < 300


def test_a_file_twice_is_refused(folder):
  made = folder("a.txt", "b.txt")
  (made / "more").mkdir()
  (made / "more" / "c.txt").symlink_to(made / "a.txt")
  again = f"{made}/../{made.name}/b.txt"
  for source in ([f"{made}/a.txt"] * 2, [made, again], f"{made}/**/*.txt"):
    with pytest.raises(ValueError, match=r'each file once, found "\S+" again'):
      sources.find(source)


def test_a_source_in_a_message():
  assert sources.shown("a.txt") == "a.txt" and sources.shown(pathlib.Path("a")) == "a"
  assert sources.shown(["a.txt", pathlib.Path("b.txt")]) == "a.txt, b.txt"
  assert re.fullmatch(r"x{197}\.\.\.", sources.shown("x" * 5000))
