"""Speed, side by side with PyTorch: cases by name, as JSON and as rows for docs/benchmarks.md.

  pip install torch==2.13.0 && pip install -e ".[parity]"
  python -m jaxalign.benchmarks.throughput --case=unet-fwd-cpu,hlo-economy --output=runs/throughput
  python -m jaxalign.benchmarks.throughput --output=runs/throughput --fill=docs/benchmarks.md

The second command measures, the third writes what there is into the page. Each side has a process
of its own; all are there while a case runs, and work in turns. PyTorch's sides have the shapes of
ours and, on a CPU, its very weights.
"""

import importlib
import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from jaxalign import files
from jaxalign.benchmarks import measure, report
from jaxalign.cli import command, paths

_CASE = flags.DEFINE_list("case", [], "Cases to measure.")
_OUTPUT = paths.define("output", None, "Folder of the results.", required=True)
_FILL = paths.define("fill", None, "Page whose tables are filled from the results.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Calls of each side, in turns.")
_SIDES = flags.DEFINE_list("sides", None, "Some of the sides; all by default.")
_SMALL = flags.DEFINE_bool("small", False, "CPU cases on a tiny network, to try the command.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: the side that this process is.")

OURS = "jaxalign"
_PEERS = ("torch", "diffusers", "transformers", "peft")


class Case(NamedTuple):
  """A case: the model, as `models.build` names it, and a function in the modules of each side.

  units: of one call, by variant or for all; what a rate counts.
  """

  model: str
  function: str
  gpu: bool
  units: int | dict[str, int]
  unit: str


CASES: dict[str, Case | None] = {
  "unet-fwd-cpu": Case("18m", "unet_forward", False, {"forward": 8, "4 steps": 8}, "images"),
  "unet-grad-cpu": Case("18m", "unet_gradient", False, 8, "images"),
  "ddpo-epoch-cpu": Case("18m", "ddpo_epoch", False, 16, "images"),
  "hlo-economy": None,  # counts, and no times
  "sd15-rollout-h200": Case(
    "sd15", "rollout", True, {"batch 1": 1, "batch 8": 8, "batch 32": 32}, "images"
  ),
  "ddpo-sd15-h200": Case("sd15", "ddpo", True, {"epoch": 64}, "images"),
  "dpo-sdxl-h200": Case(
    "sdxl",
    "dpo",
    True,
    {f"{kind}, {n} pairs": n for kind in ("full", "LoRA r8") for n in (1, 2, 4, 8)},
    "pairs",
  ),
}


def main(argv):
  del argv
  output = _OUTPUT.value
  if _WORKER.value:
    measure.serve(calls(*_WORKER.value.split("/"), output))
    return
  unknown = sorted(set(_CASE.value) - set(CASES))
  if unknown:
    raise flags.Error(f"--case: unknown {', '.join(unknown)}; known: {', '.join(CASES)}")
  if not _CASE.value and not _FILL.value:
    raise flags.Error(f"expected --case, of {', '.join(CASES)}, or --fill")
  output.mkdir(parents=True, exist_ok=True)
  for name in _CASE.value:
    check(name)
  for name in _CASE.value:
    case = CASES[name]
    result = economy() if case is None else run(name, case, output)
    files.write_json(output / f"{name}.json", {"case": name, **result})
    print(f"## {name}\n\n{report.table(result)}", flush=True)
  if _FILL.value:
    report.fill(_FILL.value, output)


def check(name: str) -> None:
  """Raises ValueError if this machine lacks what the case needs."""
  case = CASES[name]
  if case is None:
    return
  if case.gpu and measure.environment()["gpu"] == "none":
    on_cpu = [other for other, its in CASES.items() if its is None or not its.gpu]
    raise ValueError(
      f"{name}: expected an NVIDIA GPU, found none\ncases without one: {', '.join(on_cpu)}"
    )
  if case.gpu and _SMALL.value:
    raise ValueError(f"{name}: --small is for the cases on a CPU")
  wanted = [] if _sides() == [OURS] else _PEERS
  missing = [package for package in wanted if importlib.util.find_spec(package) is None]
  if missing:
    raise ValueError(
      f"{name}: expected PyTorch's side to compare with, found no {', '.join(missing)}\n"
      f'pip install torch and -e ".[parity]", or measure --sides={OURS} alone'
    )


def _sides() -> list[str]:
  known = [OURS, "torch", "torch.compile"]
  chosen = _SIDES.value or known
  if OURS not in chosen or set(chosen) - set(known):
    raise flags.Error(f"--sides: expected {OURS} and some of {', '.join(known[1:])}, got {chosen}")
  return chosen


def calls(name: str, side: str, model: str, folder: pathlib.Path) -> measure.Calls:
  """What a side's process does on request."""
  case = CASES[name]
  assert case is not None
  place = "gpu" if case.gpu else "cpu"
  prefix = "" if side == OURS else "torch_"
  module = importlib.import_module(f"jaxalign.benchmarks.{prefix}{place}")
  function: Callable[..., measure.Calls] = getattr(module, case.function)
  return function(model, folder) if side == OURS else function(
    model, folder, compiled=side == "torch.compile"
  )


def run(name: str, case: Case, output: pathlib.Path) -> dict[str, Any]:
  """Measures all sides of a case in turns."""
  before = measure.environment()
  model = "small" if _SMALL.value else case.model
  env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if case.gpu else {"JAX_PLATFORMS": "cpu"}
  sides: list[measure.Side] = []
  with tempfile.TemporaryDirectory() as folder:
    try:
      for side in _sides():
        command = [sys.executable, "-m", "jaxalign.benchmarks.throughput"]
        command += [f"--worker={name}/{side}/{model}", f"--output={folder}"]
        log = output / f"{name}.{side}.log"
        sides.append(measure.Side(side, command, log, env))
      variants = measure.interleave(sides, rounds=_ROUNDS.value)
    finally:
      for running in sides:
        running.end()
  rows = measure.summarize(variants, OURS)
  for row in rows:
    units = case.units if isinstance(case.units, int) else case.units.get(row["variant"])
    if units and "median" in row:
      row["rate"] = units / row["median"]
  return {
    "model": model,
    "unit": case.unit,
    "rounds": _ROUNDS.value,
    "environment": {**before, "load at the end": os.getloadavg()[0]},
    "rows": rows,
    "measured": variants,
  }


def economy() -> dict[str, Any]:
  """`hlo-economy`, on the CPU wherever it runs, so that it says the same everywhere."""
  import jax

  jax.config.update("jax_platforms", "cpu")
  from jaxalign.benchmarks import economy as counts

  rows = [{**row._asdict(), "ratio": row.ratio} for row in counts.rows()]
  return {"environment": measure.environment(), "economy": rows}


if __name__ == "__main__":
  command.run(main)
