"""Reads a run back from its workdir, finished or not."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import config_dict

from jaxalign import checks, files, system
from jaxalign.data import records, sources
from jaxalign.distributed import hosts
from jaxalign.training import checkpoint, guard
from jaxalign.training.state import AVERAGE
from jaxalign.types import Params

# What a run may change when it is continued: how long it goes on, on which devices, what it writes,
# how it is judged.
MAY_CHANGE = (
  *("num_iterations", "mesh", "reward_pool", "exactness"),
  *("checkpoint", "log", "samples", "evaluation", "guard", "self_check"),
)

# Fields of a config that may name a data file; what they name may also be a set without one.
DATA_FIELDS = ("data.source", "evaluation.source", "evaluation.validation", "held_out")
# What config.json has beside the sections.
DIGESTS = "digests"
CORRECTIONS = "model_corrections"
LOCK = ".running"  # names the host and the process that run in a workdir


class Run(NamedTuple):
  """What a workdir holds, made ready to sample.

  params: the trained tree of a checkpoint; its average if the run keeps one.
  step: iterations that it has seen; 0 is the base model.
  taken: which state that is, in words.
  """

  config: dict[str, Any]
  system: system.System
  params: Params
  step: int
  taken: str


def load(
  workdir: str | os.PathLike,
  *,
  process: Mapping[str, Any] = MappingProxyType({}),
  guidance: Mapping[str, Any] = MappingProxyType({}),
  take: str = "chosen",
  strength: float = 1.0,
) -> Run:
  """Reads the run of `workdir`, whose sampler `process` and `guidance` may override in part.

  `take` is "chosen", the newest checkpoint or, of a run that a guard ended, the one it chose;
  "newest" whatever a guard did; or "best", what a guard has kept whether it ended the run or not.
  `strength` is how much of the training is applied: 0 is the base model, 1 the trained one.

  Raises ValueError if there is no run with a checkpoint.
  """
  workdir = pathlib.Path(workdir)
  checks.check_choice("take", take, ("chosen", "newest", "best"))
  path = workdir / "config.json"
  if not path.is_file():
    raise ValueError(f"expected the workdir of a run, found no {path}")
  kept = guard.kept(workdir)
  if take == "best" and kept is None:
    raise ValueError(
      f"expected a run that a guard has watched, found no {workdir / guard.RECORD}\n"
      "leave --best out"
    )
  if kept is None or take == "newest" or (take == "chosen" and not kept.ended):
    step, state = checkpoint.read_latest(workdir)
    taken = f"iteration {step}, the newest checkpoint"
  elif kept.step:
    step, state = checkpoint.read_latest(workdir, checkpoint.BEST, step=kept.step)
    taken = f"iteration {step}, the best by its guard"
  else:
    step, state = 0, None
    taken = "the base model, which no iteration surpassed by its guard"
  if state is not None and "copies" not in state:
    raise ValueError(
      f"{workdir}: expected a checkpoint with copies of its parameters, found one of an earlier "
      "version\ntake the version that made it"
    )
  config = files.read_json(path)
  config["process"].update(process)
  config["guidance"].update(guidance)
  sys = system.from_config(config)
  params = sys.policy.params if state is None else state["copies"].get(AVERAGE, state["params"])
  return Run(config, sys, sys.policy.at_strength(params, strength), step, taken)


@contextlib.contextmanager
def prepared(
  workdir: str | os.PathLike, config: config_dict.ConfigDict, corrections: Sequence[str] = ()
) -> Iterator[None]:
  """A block in which the workdir is this run's alone, with its config.json.

  That has a digest of every data file that the config names, and of the first start `corrections`,
  those that its model was opened with. Of several processes all check and the first one writes.

  Raises:
    ValueError: another config's run is there, or one that began with other data, or one that is
      going on.
  """
  workdir = pathlib.Path(workdir)
  wanted = json.loads(config.to_json())
  digests = data_digests(wanted)
  path = workdir / "config.json"
  if path.exists():
    found = files.read_json(path)
    changed = [
      key
      for key in sorted(found.keys() | wanted.keys())
      if key not in (*MAY_CHANGE, DIGESTS, CORRECTIONS)
      and _given(found.get(key)) != _given(wanted.get(key))
    ]
    if changed:
      raise ValueError(
        f"workdir {workdir} belongs to another config: config.{', config.'.join(changed)} "
        "differ(s) from its config.json\nchoose another --workdir, or repeat the first command"
      )
    _check_digests(workdir, found.get(DIGESTS, {}), digests, wanted)
    corrections = found.get(CORRECTIONS, ())
  workdir.mkdir(parents=True, exist_ok=True)
  if not hosts.is_first():
    yield
    return
  with lock(workdir):
    corrected = {CORRECTIONS: list(corrections)} if corrections else {}
    files.write_json(path, {**wanted, DIGESTS: digests, **corrected})
    yield


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """A block in which no other process that asks takes the workdir.

  Two runs in one folder would go on from each other's checkpoints. The operating system drops the
  lock of a process that is killed, so none is left behind.

  Raises ValueError, which names the host and the process, if another holds it.
  """
  workdir = pathlib.Path(workdir)
  with (workdir / LOCK).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or "in another process"
      raise ValueError(
        f"workdir {workdir}: a run is going on there, {holder}\n"
        "wait for it or end it, or choose another --workdir"
      ) from None
    except OSError as error:  # some network file systems have no locks
      print(f"workdir {workdir} cannot be locked ({error}): start one run there", file=sys.stderr)
    file.truncate(0)
    file.write(f"on host {socket.gethostname()} in process {os.getpid()}\n")
    file.flush()
    yield


def data_digests(config: Mapping[str, Any]) -> dict[str, str]:
  """`{field: SHA-256}` of the data files that a config names; of several, that of theirs in order.

  Of a table that names other files it is that of the table alone: they may be many gigabytes.
  """
  found = {}
  for field in DATA_FIELDS:
    source = _value(config, field)
    try:
      paths = () if source in records.NAMED else sources.find(source)
    except ValueError:  # none; what is missing is said where it is read
      paths = ()
    if not paths:
      continue
    digests = [files.digest(path) for path in paths]
    together = "".join(f"{digest}\n" for digest in digests).encode()
    found[field] = digests[0] if len(digests) == 1 else hashlib.sha256(together).hexdigest()
  return found


def _given(value: Any) -> Any:
  """A value without the fields that are None: one that a config has newly is not a change."""
  if not isinstance(value, Mapping):
    return value
  return {key: _given(one) for key, one in value.items() if one is not None}


def _value(config: Mapping[str, Any], field: str) -> Any:
  """The value of a dotted field, None if the config has no such field."""
  value: Any = config
  for key in field.split("."):
    value = value.get(key) if isinstance(value, Mapping) else None
  return value


def _check_digests(
  workdir: pathlib.Path,
  expected: Mapping[str, str],
  found: Mapping[str, str],
  config: Mapping[str, Any],
) -> None:
  """Raises ValueError if a file was edited that a run must not change; a new field is no edit."""
  for field, digest in found.items():
    before = expected.get(field, digest)
    if before != digest and field.split(".")[0] not in MAY_CHANGE:
      raise ValueError(
        f"config.{field}: {sources.shown(_value(config, field))} was edited since the run in "
        f"{workdir} began: expected SHA-256 {before[:12]}..., found {digest[:12]}...\n"
        "put the old file back, or choose another --workdir"
      )
