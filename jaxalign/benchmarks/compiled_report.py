"""The results of `compiled` as text and as Markdown."""

import collections
import math
import os
import pathlib
import re
from typing import Any

from jaxalign import files

GB, TERA = 1e9, 1e12


def file_name(result: dict[str, Any]) -> str:
  """By case, devices, mesh and changes, so that results of one folder do not replace each other."""
  mesh = "_".join(f"{name}{size}" for name, size in result["mesh"].items())
  changed = "_".join(f"{key}={value}" for key, value in result["changes"].items())
  parts = (result["case"], result["topology"], mesh, f"slices{result['slices']}", changed)
  return re.sub(r"[^\w=.,\-]", "_", "-".join(part for part in parts if part)) + ".json"


def describe(result: dict[str, Any], *, sources: int) -> str:
  """Everything that is known of one program, in lines."""
  mesh = " x ".join(f"{name}={size}" for name, size in result["mesh"].items())
  changed = ", ".join(f"{key}={value}" for key, value in result["changes"].items())
  seconds = result["seconds"]
  lines = [
    f"{result['case']} on {result['topology']}, {mesh}{', ' + changed if changed else ''}: traced "
    f"{seconds['trace']:.0f} s, compiled {seconds['compile']:.0f} s",
    f"  memory of a device: {result['arguments'] / GB:.2f} GB arguments, "
    f"{result['temporaries'] / GB:.2f} temporaries, {result['peak'] / GB:.2f} peak, of "
    f"{result['memory'] / GB:.1f}",
    f"  {_work(result)}",
    f"  a step: {1e3 * result['step']['seconds']:.2f} ms (roofline), {result['step']['kernels']} "
    f"kernels, {result['fused_attention']} fused attentions, "
    f"{1e3 * result['step_link_seconds']:.2f} ms of collectives; the loop carries "
    f"{result['constant_bytes'] / GB:.2f} GB unchanged and casts {len(result['weight_casts'])} "
    "weights",
  ]
  lines += [f"    {line}" for line in kinds(result["step_kinds"])]
  lines += [f"    {line}" for line in collectives(result["step_collectives"])]
  lines += [f"    {line}" for line in list(kinds(result["step_sources"]))[:sources]]
  return "\n".join(lines)


def _work(result: dict[str, Any]) -> str:
  done = result["total"]["operations"]
  each = done * _devices(result) / result["examples"] / TERA
  text = f"{done / TERA:.2f} TFLOP a device, {each:.4f} an example"
  return f"{text}, {_ratio(result)} of the least" if result["least"] else text


def _devices(result: dict[str, Any]) -> int:
  return math.prod(result["mesh"].values())


def _ratio(result: dict[str, Any]) -> str:
  if not result["least"]:
    return ""
  return f"{result['total']['operations'] * _devices(result) / result['least']:.4f}"


def kinds(table: dict[str, dict[str, Any]]) -> list[str]:
  """A line for each kind of kernel, the longest first."""
  total = sum(row["seconds"] for row in table.values()) or 1.0
  return [
    f"{1e3 * row['seconds']:8.2f} ms {100 * row['seconds'] / total:5.1f} % {row['kernels']:6d} "
    f"kernels {row['operations'] / TERA:8.3f} TFLOP {row['num_bytes'] / GB:8.2f} GB  {name}"
    for name, row in table.items()
  ]


def collectives(found: list[dict[str, Any]]) -> list[str]:
  """A line for each kind of collective, axis and type, the largest first."""
  groups: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
  for one in found:
    total = groups[one["kind"], one["axes"], ", ".join(one["dtypes"])]
    total[0] += one["times"]
    total[1] += one["times"] * one["num_bytes"]
    total[2] = max(total[2], one["num_bytes"])
  ordered = sorted(groups.items(), key=lambda item: -item[1][1])
  return [
    f"{kind} over {axes}: {count} of {dtypes}, {total / 1e6:.2f} MB, at most {largest / 1e6:.2f}"
    for (kind, axes, dtypes), (count, total, largest) in ordered
  ]


def fill(page: str | os.PathLike, output: str | os.PathLike) -> None:
  """Puts the tables of the results between the page's marks of `compiled` and `compiled-kinds`."""
  page = pathlib.Path(page)
  output = pathlib.Path(output)
  results = [files.read_json(path) for path in sorted(output.glob("*.json"))]
  text = page.read_text()
  tables = {"compiled": programs_table(results), "compiled-kinds": kinds_table(results)}
  for name, table in tables.items():
    marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    found = marked.search(text)
    if found is None:
      raise ValueError(f"{page}: expected a place marked <!-- {name} -->, found none")
    text = text[: found.end(1)] + table + text[found.start(2) :]
  page.write_text(text)


def programs_table(results: list[dict[str, Any]]) -> str:
  """A row for each program: memory, work, kernels, a step's roofline and what devices send."""
  lines = [
    "| program | devices | changed | GB per device: arguments, temporaries, peak "
    "| TFLOP per device | of the least | a step: ms, kernels, fused attentions | carried, GB "
    "| sent a step, MB | ms |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for result in results:
    step = result["step"]
    sent = sum(one["times"] * one["num_bytes"] for one in result["step_collectives"])
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1)
    sizes = (result[name] / GB for name in ("arguments", "temporaries", "peak"))
    cells = [
      result["case"],
      f"{result['topology']}{': ' + mesh if mesh else ''}",
      ", ".join(f"{key}={value}" for key, value in result["changes"].items()),
      ", ".join(f"{size:.2f}" for size in sizes),
      f"{result['total']['operations'] / TERA:.2f}",
      _ratio(result),
      f"{1e3 * step['seconds']:.2f}, {step['kernels']}, {result['fused_attention']}",
      f"{result['constant_bytes'] / GB:.2f}",
      f"{sent / 1e6:.2f}",
      f"{1e3 * result['step_link_seconds']:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join([*lines, "", _versions(results)]) + "\n"


def kinds_table(results: list[dict[str, Any]]) -> str:
  """Milliseconds of a step's roofline by kind of kernel, for the programs of one device."""
  alone = [result for result in results if _devices(result) == 1]
  names = list(dict.fromkeys(name for result in alone for name in result["step_kinds"]))
  heads = [" ".join([result["case"], *result["changes"].values()]) for result in alone]
  lines = [f"| kernels | {' | '.join(heads)} |", "|---" * (len(alone) + 1) + "|"]
  for name in names:
    rows = [result["step_kinds"].get(name) for result in alone]
    cells = [f"{1e3 * row['seconds']:.2f}" if row else "" for row in rows]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  cells = [f"{1e3 * result['step']['seconds']:.2f}" for result in alone]
  return "\n".join([*lines, f"| all | {' | '.join(cells)} |"]) + "\n"


def _versions(results: list[dict[str, Any]]) -> str:
  found = {result["environment"]["jax"] for result in results}
  return f"Compiled on a CPU, not run; jax {', '.join(sorted(found))}."
