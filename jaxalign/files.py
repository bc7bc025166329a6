"""Small files read with clear errors and written so that a killed process leaves no half of one."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def replacing(file: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary name next to `file`, which takes its place once the block has succeeded."""
  file = pathlib.Path(file)
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  try:
    temporary.touch()
    mode = temporary.stat().st_mode  # the user's umask; safetensors makes files for the owner only
    yield temporary
    temporary.chmod(mode)
    os.replace(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a new folder next to `folder`, which takes its place once the block has succeeded."""
  folder = pathlib.Path(folder).resolve()
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
  replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
  try:
    temporary.mkdir()
    yield temporary
    if folder.exists():
      os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    if replaced.exists() and not folder.exists():
      os.replace(replaced, folder)


def digest(file: str | os.PathLike) -> str:
  """The SHA-256 of a file's content, in hexadecimal digits."""
  with pathlib.Path(file).open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(file: str | os.PathLike) -> dict[str, Any]:
  """Parses a JSON object; ValueError naming the file if it is missing or something else."""
  try:
    content = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ValueError(f"expected the file {file}, found none") from None
  except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
    raise ValueError(f"{file} is not valid JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{file}: expected a JSON object, found a {type(content).__name__}")
  return content


def write_json(file: str | os.PathLike, content: Mapping[str, Any]) -> None:
  """Writes a JSON object atomically."""
  with replacing(file) as temporary:
    temporary.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
