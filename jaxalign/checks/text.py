"""Pieces of messages, which stay readable whatever a user or a library puts into them."""

import difflib
from collections.abc import Iterable
from typing import Any


def closest(word: str, options: Iterable[str]) -> str:
  """`; did you mean "..."?` for the nearest of the options, or nothing if none is near."""
  matches = difflib.get_close_matches(word, list(options), n=1)
  return f'; did you mean "{matches[0]}"?' if matches else ""


def shown(value: Any, limit: int = 80) -> str:
  """`repr(value)`, cut: a message stays readable whatever a file holds."""
  return cut(repr(value), limit)


def cut(text: str, limit: int) -> str:
  """The text, its end replaced by dots if it has more than `limit` characters."""
  return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: BaseException) -> str:
  """What an error says first, or its kind if it says nothing: libraries go on for pages."""
  return (said(error) or type(error).__name__).splitlines()[0]


def in_one_line(error: BaseException) -> str:
  """The kind of an error and all that it says."""
  return " ".join(f"{type(error).__name__}: {said(error)}".split())


def said(error: BaseException) -> str:
  """`str(error)`, or nothing where a user's own class of errors cannot say it."""
  try:
    return str(error).strip()
  except Exception:
    return ""


def first(entries: Iterable[str], *, count: int = 5, limit: int = 140) -> str:
  """The first few entries, and how many more there are, as one line of about `limit` characters."""
  entries = [cut(entry, limit) for entry in entries]
  listed = entries[:1]
  for entry in entries[1:count]:
    if len(", ".join([*listed, entry])) > limit:
      break
    listed.append(entry)
  more = len(entries) - len(listed)
  return ", ".join(listed) + (f", and {more} more" if more > 0 else "")


def brief(text: str, *, lines: int = 3, limit: int = 900) -> str:
  """The text in at most so many lines and characters: libraries go on for pages.

  The first lines say what failed, the last one why. What no terminal shows is escaped.
  """
  parts = text.splitlines() or [""]
  if len(parts) > lines:
    parts = [*parts[: max(1, lines - 2)], parts[-1].strip()]
  text = "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in p) for p in parts)
  if len(text) <= limit:
    return text
  end = limit // 3
  return f"{text[: limit - end - 5]} ... {text[-end:]}"
