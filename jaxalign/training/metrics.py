"""Writers: `metrics.jsonl`, TensorBoard events, and Weights & Biases when asked for."""

import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping

import jax
import numpy as np

from jaxalign import files
from jaxalign.distributed import hosts


class NonFiniteError(ValueError):
  """A metric became NaN or infinite."""


class Writer:
  """Writes one record per step, to every sink at once.

  `metrics.jsonl` is the record of truth: after a restart at step `k` the lines of steps `>= k`,
  which the killed run wrote after its last checkpoint, are dropped and written again.
  """

  def __init__(self, workdir: str | os.PathLike, *, start_step: int, wandb_project: str = ""):
    workdir = pathlib.Path(workdir)
    import tensorboardX

    self._path = workdir / "metrics.jsonl"
    _drop_lines_from(self._path, start_step)
    self._file = self._path.open("a")
    self._events = tensorboardX.SummaryWriter(str(workdir / "events"), purge_step=start_step)
    self._wandb = _start_wandb(wandb_project, workdir) if wandb_project else None

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    """Appends one record; raises NonFiniteError, after writing it, if a value is not finite.

    A figure that is not defined is None: null in the file, and left out of the other sinks.
    """
    known = {name: None if value is None else float(value) for name, value in metrics.items()}
    self._file.write(json.dumps({"step": step, **known}) + "\n")
    self._file.flush()
    values = {name: value for name, value in known.items() if value is not None}
    for name, value in values.items():
      self._events.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)
    check_finite(step, values)

  def picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Logs a uint8 picture `[H, W, 3]`."""
    self._events.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    self._file.close()
    self._events.close()
    if self._wandb is not None:
      self._wandb.finish()


class Silent:
  """The writer of every process but the first: it writes nothing, and stops when that one would."""

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    check_finite(step, {name: value for name, value in metrics.items() if value is not None})

  def picture(self, step: int, name: str, picture: np.ndarray) -> None:
    pass

  def close(self) -> None:
    pass


def make_writer(
  workdir: str | os.PathLike, *, start_step: int, wandb_project: str = ""
) -> Writer | Silent:
  """The writer of this process."""
  workdir = pathlib.Path(workdir)
  if not hosts.is_first():
    return Silent()
  return Writer(workdir, start_step=start_step, wandb_project=wandb_project)


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
  """Raises NonFiniteError, naming the step and the metrics, if a value is NaN or infinite."""
  broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
  if broken:
    raise NonFiniteError(f"step {step}: {', '.join(broken)} became NaN or infinite")


class CompilationCounter:
  """Counts the programs that XLA has compiled, or fetched from its cache, since it was made."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration: float, **_) -> None:
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
      self.count += 1


def read(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """The records of a run's `metrics.jsonl`, in order; what was null is left out."""
  workdir = pathlib.Path(workdir)

  def known(line: str) -> dict[str, float]:
    return {name: value for name, value in json.loads(line).items() if value is not None}

  return [known(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _drop_lines_from(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  kept = [line for line in path.read_text().splitlines() if _step_of(line) < step]
  with files.replacing(path) as temporary:
    temporary.write_text("".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
  """The step of a record; infinity for the half line that a killed process leaves behind."""
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError, TypeError):
    return math.inf


def _start_wandb(project: str, workdir: pathlib.Path):
  try:
    import wandb
  except ImportError as error:
    raise ValueError(
      "config.log.wandb_project is set but wandb is not installed; pip install wandb, or unset it"
    ) from error
  path = workdir / "wandb_id"  # a name of its own, so that a restart continues the same run there
  if not path.exists():
    path.write_text(uuid.uuid4().hex)
  return wandb.init(project=project, dir=str(workdir), resume="allow", id=path.read_text())
