"""The content of a file: unpacked, and compared with what its suffix says it is."""

import bz2
import gzip
import io
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import BinaryIO

from jaxalign import checks

try:
  from compression import zstd
except ImportError:  # before Python 3.14
  zstd = None

# What the standard library unpacks.
PACKED: Mapping[str, Callable[[bytes], bytes]] = {
  ".gz": gzip.decompress,
  ".bz2": bz2.decompress,
  ".xz": lzma.decompress,
  **({".zst": zstd.decompress} if zstd else {}),
}
_ZSTD_ERRORS = (zstd.ZstdError,) if zstd else ()
# What is to be said of others.
_HINTS = {
  **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack the archive"),
  ".zst": "unpack it first, zstd -d: Python 3.14 and later read zstd",
  ".xlsx": "save it as .csv",
}
HEAD = 512  # bytes that a kind of content is known by

# What a file begins with, what it is then, and what to do about it unless its suffix says so too.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str, tuple[str, ...]], ...] = tuple(
  (re.compile(pattern, re.IGNORECASE | re.DOTALL), what, remedy, suffixes)
  for pattern, what, remedy, suffixes in (
    (rb"PAR1", "a parquet file", "let its name end in .parquet", (".parquet",)),
    (rb"ARROW1", "an Arrow file", "let its name end in .arrow", (".arrow", ".feather")),
    (rb"\x1f\x8b", "content packed with gzip", "let its name end in .gz", ()),
    (rb"BZh[1-9]1AY&SY", "content packed with bzip2", "let its name end in .bz2", ()),
    (rb"\xfd7zXZ\0", "content packed with xz", "let its name end in .xz", ()),
    (rb"\x28\xb5\x2f\xfd", "content packed with zstd", "let its name end in .zst", ()),
    (rb"PK\x03\x04", "a zip archive", "unpack it and name the files in it", ()),
    (rb".{257}ustar", "a tar archive", "unpack it and name the files in it", ()),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP", "a picture", "name a file of rows", ()),
    (rb"%PDF-|SQLite format 3\0|\x89HDF|\x93NUMPY", "binary content", "name a file of rows", ()),
    (rb"version https://git-lfs", "a pointer of git-lfs", "fetch the file: git lfs pull", ()),
    (rb"\s*<(!doctype|html)", "a web page", "download the file itself", ()),
  )
)


def suffixes(path: pathlib.Path) -> tuple[str, str]:
  """(what it is, what it is packed with), in lower case, "" for none: (".txt", ".gz")."""
  last = path.suffix.lower()
  if last not in PACKED:
    return last, ""
  return path.with_suffix("").suffix.lower(), last


def hint(path: pathlib.Path) -> str:
  """What else to say of a file whose suffix is not one that is read."""
  found = _HINTS.get(suffixes(path)[0])
  return f"; {found}" if found else ""


def read(path: pathlib.Path) -> bytes:
  """The whole content, unpacked; ValueError if it is broken, or not what the suffix says."""
  return _checked(path, _unpacked(path))


def opened(path: pathlib.Path) -> BinaryIO:
  """The content as a file that can be searched; only what is packed is held in memory."""
  if suffixes(path)[1]:
    return io.BytesIO(read(path))
  with path.open("rb") as file:
    _checked(path, file.read(HEAD))
  return path.open("rb")


def text(path: pathlib.Path) -> str:
  """The content as text, without the mark that Windows puts first; ValueError unless UTF-8."""
  content = read(path)
  try:
    found = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t utf-8"
    ) from error
  if "\0" in found:
    raise ValueError(
      f"{path}: expected text, found NUL characters (at {found.index(chr(0))}); if it is UTF-16, "
      "convert it with iconv -f utf-16 -t utf-8"
    )
  return found


def _unpacked(path: pathlib.Path) -> bytes:
  content, packed = path.read_bytes(), suffixes(path)[1]
  if not packed:
    return content
  try:
    return PACKED[packed](content)
  except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, *_ZSTD_ERRORS) as error:
    raise ValueError(f"{path} is no whole {packed} file: {checks.first_line(error)}") from error


def _checked(path: pathlib.Path, content: bytes) -> bytes:
  """The content; ValueError if it begins as a file of another kind does."""
  suffix, _ = suffixes(path)
  for pattern, what, remedy, own in _KINDS:
    if pattern.match(content[:HEAD]) and suffix not in own:
      named = f"content as {suffix} says" if suffix else "text, as the name has no suffix"
      raise ValueError(f"{path}: expected {named}, found {what}; {remedy}")
  return content
