"""Sources of data: the files that a file, a folder, a pattern, or a list of these stand for."""

import glob
import os
import pathlib
import re
from collections.abc import Callable, Sequence

from jaxalign import checks
from jaxalign.data import readers
from jaxalign.data.readers import contents

Source = str | os.PathLike | Sequence[str | os.PathLike]

# How the parts of a data set are called in the names of its files.
_SPLITS = {
  "train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test",
  "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
# Files that describe those beside them: of the `datasets` library, of our recipes, and of people.
_DESCRIPTIONS = (
  *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
  *("about.json", "readme.txt", "license.txt"),
)


class NotFoundError(ValueError):
  """There is no such file."""


def find(source: Source) -> tuple[pathlib.Path, ...]:
  """The files of a source, in a fixed order: that of a list, else of the numbers in their names.

  Args:
    source: a file; a folder, of which the data files count that are right in it, are not hidden,
      and do not begin with "_"; a pattern with *, ? or **; or a list of these.

  Raises:
    NotFoundError: none found.
    ValueError: no source, one found twice, or a folder with files of several kinds or of several
      parts of a data set, such as train and test: which are meant is not known.
  """
  each = [source] if isinstance(source, str | os.PathLike) else source
  if not isinstance(each, list | tuple) or not each:
    raise ValueError(
      f"expected a file, a folder, a pattern or a list of these, got {checks.shown(source)}"
    )
  found: list[pathlib.Path] = []
  for one in each:
    if not isinstance(one, str | os.PathLike):
      raise ValueError(f"expected a list of paths, got one of {checks.shown(one)}")
    found += _find_one(os.fspath(one))
  _check_once(found, lambda path: path.resolve(), "each file once")
  return tuple(found)


def shown(source: Source) -> str:
  """The source for a message."""
  one = isinstance(source, str | os.PathLike)
  text = os.fspath(source) if one else ", ".join(map(str, source))  # type: ignore[arg-type]
  return checks.cut(str(text), 200)


def _find_one(source: str) -> tuple[pathlib.Path, ...]:
  # os.path, because a Path raises for a name that is too long.
  if os.path.isfile(source):
    return (pathlib.Path(source),)
  if os.path.isdir(source):
    return _in_folder(pathlib.Path(source))
  if not glob.has_magic(source):
    raise NotFoundError(f'found no such file "{shown(source)}"')
  matching = (pathlib.Path(name) for name in glob.glob(source, recursive=True))
  found = sorted((p for p in matching if p.is_file() and _is_data(p)), key=_natural)
  if not found:
    raise NotFoundError(f'found no file that matches "{shown(source)}"')
  return tuple(found)


def _in_folder(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  there = sorted((path for path in folder.iterdir() if _is_data(path)), key=_natural)
  # A file without a suffix is text only where it is named.
  kinds = {
    path: contents.suffixes(path)[0]
    for path in there
    if path.is_file() and path.name.lower() not in _DESCRIPTIONS
  }
  found = [path for path, kind in kinds.items() if kind and kind in readers.READERS]
  if not found:
    inside = checks.first(path.name + "/" * path.is_dir() for path in there) or "nothing"
    raise NotFoundError(f'found no file to read in the folder "{shown(folder)}", only {inside}')
  remedy = f'name some of them, such as "{folder}/*{kinds[found[0]]}"'
  if len({readers.READERS[kinds[path]] for path in found}) > 1:
    some = checks.first(dict.fromkeys(f"*{kinds[path]}" for path in found))
    raise ValueError(f'expected files of one kind in "{shown(folder)}", found {some}\n{remedy}')
  splits = sorted(set(filter(None, map(_split, found))))
  if len(splits) > 1:
    raise ValueError(
      f'expected one part of a data set in "{shown(folder)}", found {", ".join(splits)}\n'
      f'name one of them, such as "{folder}/{splits[0]}*"'
    )
  _check_once(found, _unpacked_name, "each file once, packed or not")
  return tuple(found)


def _check_once(
  found: Sequence[pathlib.Path], key: Callable[[pathlib.Path], object], expected: str
) -> None:
  seen = set()
  for path in found:
    if key(path) in seen:
      raise ValueError(f'expected {expected}, found "{shown(path)}" again')
    seen.add(key(path))


def _is_data(path: pathlib.Path) -> bool:
  """Others are of an editor or of the program that wrote the data, such as _SUCCESS."""
  return not path.name.startswith((".", "_"))


def _unpacked_name(path: pathlib.Path) -> str:
  return path.stem if contents.suffixes(path)[1] else path.name


def _split(path: pathlib.Path) -> str | None:
  """The part of a data set that a file says in its name, if any."""
  words = re.split(r"[^a-z]+", path.name.lower())
  return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _natural(path: pathlib.Path) -> tuple[list[str | int], str]:
  """A key that sorts numbers in names by their value, 2 before 10."""
  parts = re.split(r"(\d+)", str(path))  # text and numbers in turn
  return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)
