"""Speed, side by side with PyTorch: cases by name, as JSON and as rows for docs/benchmarks.md.

  pip install torch==2.13.0 && pip install -e ".[parity]"
  python -m jaxalign.benchmarks.throughput --case=unet-fwd-cpu,hlo-economy --output=runs/throughput
  python -m jaxalign.benchmarks.throughput --output=runs/throughput --fill=docs/benchmarks.md

The second command measures, the third writes what there is into the page. Each side has a process
of its own; all are there while a case runs, and work in turns. PyTorch's sides have the shapes of
ours and, on a CPU, its very weights.
"""

import functools
import importlib
import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from jaxalign import files
from jaxalign.benchmarks import measure, report
from jaxalign.cli import command, paths

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


def define_flags(values: flags.FlagValues) -> None:
  define_list = functools.partial(flags.DEFINE_list, flag_values=values)
  define_path = functools.partial(paths.define, flag_values=values)
  define_list("case", [], "Cases to measure.")
  define_path("output", None, "Folder of the results.", required=True)
  define_path("fill", None, "Page whose tables are filled from the results.")
  flags.DEFINE_integer("rounds", 7, "Calls of each side, in turns.", flag_values=values)
  define_list("sides", None, "Some of the sides; all by default.")
  help = "CPU cases on a tiny network, to try the command."
  flags.DEFINE_bool("small", False, help, flag_values=values)
  help = "Internal: the side that this process is."
  flags.DEFINE_string("worker", None, help, flag_values=values)


def main(values: flags.FlagValues) -> None:
  output = values.output
  if values.worker:
    measure.serve(calls(*values.worker.split("/"), output))
    return
  unknown = sorted(set(values.case) - set(CASES))
  if unknown:
    raise flags.Error(f"--case: unknown {', '.join(unknown)}; known: {', '.join(CASES)}")
  if not values.case and not values.fill:
    raise flags.Error(f"expected --case, of {', '.join(CASES)}, or --fill")
  output.mkdir(parents=True, exist_ok=True)
  sides = check_sides(values.sides)
  for name in values.case:
    check(name, sides, small=values.small)
  for name in values.case:
    case = CASES[name]
    if case is None:
      result = economy()
    else:
      result = run(name, case, output, sides, rounds=values.rounds, small=values.small)
    files.write_json(output / f"{name}.json", {"case": name, **result})
    print(f"## {name}\n\n{report.table(result)}", flush=True)
  if values.fill:
    report.fill(values.fill, output)


def check(name: str, sides: Sequence[str], *, small: bool) -> None:
  """Raises ValueError if this machine lacks what the case needs."""
  case = CASES[name]
  if case is None:
    return
  if case.gpu and measure.environment()["gpu"] == "none":
    on_cpu = [other for other, its in CASES.items() if its is None or not its.gpu]
    raise ValueError(
      f"{name}: expected an NVIDIA GPU, found none\ncases without one: {', '.join(on_cpu)}"
    )
  if case.gpu and small:
    raise ValueError(f"{name}: --small is for the cases on a CPU")
  wanted = [] if sides == [OURS] else _PEERS
  missing = [package for package in wanted if importlib.util.find_spec(package) is None]
  if missing:
    raise ValueError(
      f"{name}: expected PyTorch's side to compare with, found no {', '.join(missing)}\n"
      f'pip install torch and -e ".[parity]", or measure --sides={OURS} alone'
    )


def check_sides(chosen: list[str] | None) -> list[str]:
  """The sides that are measured, all by default; flags.Error for one that is not known."""
  known = [OURS, "torch", "torch.compile"]
  chosen = chosen or known
  if OURS not in chosen or set(chosen) - set(known):
    raise flags.Error(f"--sides: expected {OURS} and some of {', '.join(known[1:])}, got {chosen}")
  return chosen


def calls(name: str, side: str, model: str, folder: str | os.PathLike) -> measure.Calls:
  """What a side's process does on request."""
  folder = pathlib.Path(folder)
  case = CASES[name]
  assert case is not None
  place = "gpu" if case.gpu else "cpu"
  prefix = "" if side == OURS else "torch_"
  module = importlib.import_module(f"jaxalign.benchmarks.{prefix}{place}")
  function: Callable[..., measure.Calls] = getattr(module, case.function)
  return function(model, folder) if side == OURS else function(
    model, folder, compiled=side == "torch.compile"
  )


def run(
  name: str,
  case: Case,
  output: str | os.PathLike,
  sides: Sequence[str],
  *,
  rounds: int,
  small: bool,
) -> dict[str, Any]:
  """Measures all sides of a case in turns."""
  output = pathlib.Path(output)
  before = measure.environment()
  model = "small" if small else case.model
  env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if case.gpu else {"JAX_PLATFORMS": "cpu"}
  started: list[measure.Side] = []
  with tempfile.TemporaryDirectory() as folder:
    try:
      for side in sides:
        command = [sys.executable, "-m", "jaxalign.benchmarks.throughput"]
        command += [f"--worker={name}/{side}/{model}", f"--output={folder}"]
        log = output / f"{name}.{side}.log"
        started.append(measure.Side(side, command, log, env))
      variants = measure.interleave(started, rounds=rounds)
    finally:
      for running in started:
        running.end()
  rows = measure.summarize(variants, OURS)
  for row in rows:
    units = case.units if isinstance(case.units, int) else case.units.get(row["variant"])
    if units and "median" in row:
      row["rate"] = units / row["median"]
  return {
    "model": model,
    "unit": case.unit,
    "rounds": rounds,
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
  command.run(main, define_flags)
