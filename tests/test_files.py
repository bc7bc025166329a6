"""Small files and folders: read with clear errors, replaced whole or not at all."""

import os

import pytest

from jaxalign import files


@pytest.mark.parametrize(
  ("content", "words"),
  [(None, "found none"), (b"{", "not valid JSON"), (b"\xff\xfe\x00", "JSON"), (b"[1]", "a list")],
)
def test_bad_json(tmp_path, content, words):
  file = tmp_path / "config.json"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(ValueError, match=f"config.json.*{words}"):
    files.read_json(file)


def names_in(folder):
  return {path.name for path in folder.iterdir()}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
  with files.replacing_folder(tmp_path / "new" / "export") as folder:
    (folder / "one").write_text("1")
  assert names_in(tmp_path / "new" / "export") == {"one"}
  with (
    pytest.raises(OSError, match="no space"),
    files.replacing_folder(tmp_path / "new" / "export") as folder,
  ):
    (folder / "two").write_text("2")
    raise OSError("no space left on device")
  assert names_in(tmp_path / "new" / "export") == {"one"}
  with files.replacing_folder(tmp_path / "new" / "export") as folder:
    (folder / "two").write_text("2")
  assert names_in(tmp_path / "new" / "export") == {"two"}
  assert names_in(tmp_path / "new") == {"export"}


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
  (tmp_path / "export").mkdir()
  (tmp_path / "export" / "one").write_text("1")
  plain = os.replace

  def fail(source, target):
    if str(source).endswith(".tmp"):
      raise OSError("device or resource busy")
    plain(source, target)

  monkeypatch.setattr(os, "replace", fail)
  with (
    pytest.raises(OSError, match="busy"),
    files.replacing_folder(tmp_path / "export") as folder,
  ):
    (folder / "two").write_text("2")
  assert names_in(tmp_path / "export") == {"one"}
  assert names_in(tmp_path) == {"export"}
