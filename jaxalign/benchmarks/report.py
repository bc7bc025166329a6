"""The results of `throughput` as Markdown, and the page that they are written into."""

import os
import pathlib
import re
from typing import Any

from jaxalign import files
from jaxalign.benchmarks import measure


def table(result: dict[str, Any]) -> str:
  """The result as a Markdown table, and a line about the machine."""
  if "economy" in result:
    lines = ["| program | MFLOP, compiled | least | ratio |", "|---|---|---|---|"]
    for row in result["economy"]:
      compiled, least = row["compiled"] / 1e6, row["minimum"] / 1e6
      lines.append(f"| {row['program']} | {compiled:.1f} | {least:.1f} | {row['ratio']:.3f} |")
  else:
    unit = result["unit"]
    lines = [
      f"| work | side | median, s | best, s | {unit}/s | our time / its: median, best | first, s |",
      "|---|---|---|---|---|---|---|",
      *(_line(row) for row in result["rows"]),
    ]
  machine = _machine(result["environment"])
  if "rounds" in result:
    machine = f"{result['rounds']} rounds. {machine}"
  return "\n".join([*lines, "", machine]) + "\n"


def _line(row: dict[str, Any]) -> str:
  def number(key: str, digits: int = 3) -> str:
    return f"{row[key]:.{digits}f}" if key in row else ""

  if row["error"]:
    return f"| {row['variant']} | {row['side']} | {row['error']} | | | | |"
  ratios = f"{number('ratio_median', 2)}, {number('ratio_best', 2)}"
  cells = [row["variant"], row["side"], number("median"), number("best"), number("rate", 2)]
  return f"| {' | '.join([*cells, ratios, number('first', 1)])} |"


def _machine(environment: dict[str, Any]) -> str:
  versions = ", ".join(f"{name} {environment[name]}" for name in measure.PACKAGES)
  device = environment["cpu"] if environment["gpu"] == "none" else environment["gpu"]
  return (
    f"{device}, {environment['cores']} cores, threads: {environment['threads']}, load "
    f"{environment['load']:.1f} at the start; Python {environment['python']}, {versions}"
  )


def fill(page: str | os.PathLike, output: str | os.PathLike) -> None:
  """Puts the table of each result between the page's `<!-- NAME -->` and `<!-- /NAME -->`."""
  page = pathlib.Path(page)
  output = pathlib.Path(output)
  text = page.read_text()
  for path in sorted(output.glob("*.json")):
    result = files.read_json(path)
    name = re.escape(result["case"])
    marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    found = marked.search(text)
    if found is None:
      raise ValueError(f"{page}: expected a place marked <!-- {result['case']} -->, found none")
    text = text[: found.end(1)] + table(result) + text[found.start(2) :]
  page.write_text(text)
