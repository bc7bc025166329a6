"""Checkpoints of the whole training state, through orbax."""

import contextlib
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign import checks
from jaxalign.checks.own_code import FAILURES

CHECKPOINTS, BEST = "checkpoints", "best"

# Bytes of an array above which its replicas share the writing. They do so by a program for each of
# its shapes, which takes longer to compile than a small array takes to write.
_SHARED_FROM = 2**24


def _share_large_arrays_only() -> None:
  """For all of orbax in this process, which has no such option for one manager."""
  handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_FROM)
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)  # it warns of every handler that takes another's place
  ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
  logger.setLevel(level)


_share_large_arrays_only()


class Manager:
  """Saves and restores the state of a run; a checkpoint is complete or absent, never half written.

  A context manager, for the iterations of a run: an error in it loses no finished one, as the state
  that `save` was given last is saved before the error goes on.

  Args:
    workdir: the run's folder; checkpoints go to `workdir/<folder>/<step>`.
    every: save after each `every` iterations (and whenever `save` is called with force); 0 saves
      with force only.
    keep: how many of the newest to keep.
    folder: "checkpoints", or `BEST` for the one that a guard keeps.
  """

  def __init__(
    self, workdir: str | os.PathLike, *, every: int, keep: int, folder: str = CHECKPOINTS
  ):
    workdir = pathlib.Path(workdir)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    self._every = every
    self._last: tuple[int, Any] | None = None  # what `save` was given and has not saved
    self._manager = ocp.CheckpointManager((workdir / folder).absolute(), options=options)

  def restore_latest(self, state: Any) -> Any:
    """The newest checkpoint, shaped and placed like `state`; `state` itself if there is none.

    Raises OSError if there is no room for another one, before anything is trained for it.
    """
    _check_room(self._manager, state)
    step = self._manager.latest_step()
    if step is None:
      return state
    return self.restore(step, state)

  def restore(self, step: int, state: Any) -> Any:
    """The checkpoint after `step` iterations, shaped and placed like `state`; it must be there."""
    _check_there(self._manager, step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return _restore(self._manager, step, ocp.args.StandardRestore(abstract))

  def save(self, step: int, state: Any, *, force: bool = False) -> None:
    """Saves in the background if `step` is due, or at once with `force`.

    Raises OSError if there is no room for it, or an earlier one could not be written.
    """
    is_due = self._every > 0 and step % self._every == 0
    self._last = None if is_due or force else (step, state)
    if (is_due or force) and self._manager.latest_step() != step:
      with _in_words(self._manager):
        _check_room(self._manager, state)
        # Always forced: left to its own rule the manager also saves the first step it is shown.
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

  def wait(self) -> None:
    """Until pending writes are on disk; OSError if they cannot be."""
    with _in_words(self._manager):
      self._manager.wait_until_finished()

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    if jax.process_count() > 1:
      return  # one that has ended would be waited for for ever
    if kind is not None and issubclass(kind, FAILURES) and self._last is not None:
      step, state = self._last
      # An update takes the arrays of the state before it: what it leaves is no iteration.
      if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        self.save(step, state, force=True)
        print(f"iteration {step} is saved, and the same command goes on after it", file=sys.stderr)
    self.wait()

  def close(self) -> None:
    """Waits for pending writes."""
    self.wait()
    self._manager.close()


@contextlib.contextmanager
def _in_words(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Makes an OSError of a line or two out of what tensorstore raises where it cannot write."""
  try:
    yield
  except ValueError as error:
    reason = checks.first_line(error)
    # It names one file within another; what is wrong stands at the end.
    reason = reason if len(reason) <= 300 else f"{reason[:100]} ... {reason[-200:]}"
    raise OSError(_cannot_write(manager, reason)) from error


def _check_room(manager: ocp.CheckpointManager, state: Any) -> None:
  """Raises OSError if a checkpoint would not fit on the disk, before half of it is written."""
  # Numbers hardly compress, and the oldest checkpoint goes when the new one is complete.
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  free = shutil.disk_usage(manager.directory).free
  if free < needed:
    raise OSError(
      _cannot_write(manager, f"expected {needed / 1e6:.1f} MB of room, found {free / 1e6:.1f} MB")
    )


def _cannot_write(manager: ocp.CheckpointManager, reason: str) -> str:
  newest = manager.latest_step()
  kept = "none is there yet" if newest is None else f"the newest is of iteration {newest}"
  return (
    f"no checkpoint could be written to {manager.directory}: {reason}\n"
    f"{kept}; make room, or choose another --workdir, and the same command goes on"
  )


def read_latest(
  workdir: str | os.PathLike, folder_name: str = CHECKPOINTS, *, step: int | None = None
) -> tuple[int, dict[str, Any]]:
  """The newest checkpoint as `(step, nested dict of arrays)`, without a state to shape it by.

  With `step`, the one after so many iterations.
  """
  workdir = pathlib.Path(workdir)
  folder = (workdir / folder_name).absolute()
  if folder.is_dir():
    with ocp.CheckpointManager(folder) as manager:
      step = manager.latest_step() if step is None else step
      if step is not None:
        _check_there(manager, step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not where it was trained
        return step, _restore(manager, step, ocp.args.StandardRestore(fallback_sharding=here))
  raise ValueError(f"expected a checkpoint in {folder}, found none: has the run saved one yet?")


def _check_there(manager: ocp.CheckpointManager, step: int) -> None:
  found = sorted(manager.all_steps())
  if step not in found:
    raise ValueError(
      f"expected the checkpoint of iteration {step} in {manager.directory}, found "
      f"{', '.join(map(str, found)) or 'none'}"
    )


def _restore(manager: ocp.CheckpointManager, step: int, args: ocp.args.StandardRestore) -> Any:
  try:
    return manager.restore(step, args=args)
  except (ValueError, KeyError, FileNotFoundError) as error:
    raise ValueError(
      f"checkpoint {manager.directory / str(step)} does not fit this run: "
      f"{checks.first_line(error)}\n"
      "Its data or code have changed, or it is damaged; if it is damaged, move that folder away "
      "to use the one before."
    ) from error
