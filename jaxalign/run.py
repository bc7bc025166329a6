"""Reads a run back from its workdir, finished or not."""

import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxalign import checkpoint, files, system
from jaxalign.types import Params


class Run(NamedTuple):
  """What a workdir holds, made ready to sample.

  params: the trained tree of the newest checkpoint; its average if the run keeps one.
  step: iterations that it has seen.
  """

  config: dict[str, Any]
  system: system.System
  params: Params
  step: int


def load(
  workdir: pathlib.Path,
  *,
  process: Mapping[str, Any] = MappingProxyType({}),
  guidance: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
  """Reads the run of `workdir`, whose sampler `process` and `guidance` may override in part.

  Raises ValueError if there is no run with a checkpoint.
  """
  path = workdir / "config.json"
  if not path.is_file():
    raise ValueError(f"expected the workdir of a run, found no {path}")
  step, state = checkpoint.read_latest(workdir)
  config = files.read_json(path)
  config["process"].update(process)
  config["guidance"].update(guidance)
  sys = system.from_config(config)
  return Run(config, sys, state.get("ema_params") or state["params"], step)
