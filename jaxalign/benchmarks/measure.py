"""Timing that bears a busy machine: one process a side, interleaved rounds, medians, ratios."""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from jaxalign import streams

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "peft")

# Seconds between calls: threads of the side before may spin for a while after its last work.
PAUSE = 0.3

# A call does one unit of work, waits for it, and returns a number that all sides must agree on.
Calls = Mapping[str, Callable[[], float]]


def serve(calls: Calls) -> None:
  """A side's process: answers each variant's name on stdin with seconds and value, as JSON.

  The first call of a variant, which compiles, is made by "first NAME". One that does not fit into
  memory answers with an error, and the process goes on.
  """
  answers = sys.stdout
  sys.stdout = sys.stderr  # libraries that print must not get between the answers
  print(json.dumps({"variants": list(calls)}), file=answers, flush=True)
  for line in sys.stdin:
    call = calls[line.strip().removeprefix("first ")]
    began = time.perf_counter()
    try:
      answer: dict[str, Any] = {"value": call(), "seconds": time.perf_counter() - began}
    except RuntimeError as error:  # of JAX and PyTorch alike
      if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
        raise
      answer = {"error": "out of memory"}
    print(json.dumps(answer), file=answers, flush=True)


class Side:
  """The process of one side, which works when it is asked to and waits otherwise."""

  def __init__(self, name: str, command: list[str], log: str | os.PathLike, env: Mapping[str, str]):
    log = pathlib.Path(log)
    self.name, self._log = name, log
    with log.open("w") as errors:
      self._process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, **env},
      )
    self.variants = self._answer()["variants"]

  def ask(self, request: str) -> dict[str, Any]:
    assert self._process.stdin is not None
    self._process.stdin.write(request + "\n")
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      last = self._log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
      raise ValueError(f"the side {self.name} ended: {last[0]}\nits whole output is in {self._log}")
    return json.loads(line)

  def end(self) -> None:
    self._process.kill()
    self._process.wait()


def interleave(sides: list[Side], *, rounds: int, seed: int = 0) -> dict[str, Any]:
  """`{variant: {side: results}}`; in each round all sides work once, in random order.

  A side's results are `first` (seconds of the call that compiles), `seconds` (of each round) and
  `value`, or `error`. A variant that not every side has is measured on those that do.
  """
  order = streams.generator(seed, "benchmark order")
  variants = dict.fromkeys(variant for side in sides for variant in side.variants)
  found: dict[str, Any] = {}
  for variant in variants:
    taking: list[Side] = []
    results: dict[str, dict[str, Any]] = {}
    for side in sides:
      if variant not in side.variants:
        continue
      answer = side.ask(f"first {variant}")
      if "error" in answer:
        results[side.name] = answer
        continue
      results[side.name] = {"first": answer["seconds"], "value": answer["value"], "seconds": []}
      taking.append(side)
      side.ask(variant)  # not counted: caches and frequencies settle
    for _ in range(rounds):
      for number in order.permutation(len(taking)):
        side = taking[number]
        time.sleep(PAUSE)
        results[side.name]["seconds"].append(side.ask(variant)["seconds"])
    found[variant] = results
  return found


def summarize(variants: Mapping[str, Any], ours: str) -> list[dict[str, Any]]:
  """A row for each variant and side; the ratios are our time over its: above 1, we take longer."""
  rows = []
  for variant, results in variants.items():
    own = results.get(ours, {}).get("seconds")
    for side, result in results.items():
      times = result.get("seconds")
      row = {"variant": variant, "side": side, "error": result.get("error")}
      if times:
        row |= {"median": statistics.median(times), "best": min(times)}
        row |= {"first": result["first"], "value": result["value"]}
      if times and own:
        row["ratio_median"] = statistics.median(own) / statistics.median(times)
        row["ratio_best"] = min(own) / min(times)
      rows.append(row)
  return rows


def environment() -> dict[str, Any]:
  """What the numbers were measured on."""
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = "not installed"
  return {
    "cpu": _cpu_name(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
    "gpu": _gpu_name(),
    "python": platform.python_version(),
    "load": os.getloadavg()[0],
    **versions,
  }


def _cpu_name() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.is_file() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor()


def _gpu_name() -> str:
  try:
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    printed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return "none"
  return printed.splitlines()[0].strip() if printed.strip() else "none"
