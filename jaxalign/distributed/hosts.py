"""Several processes as one job: how they find each other, agree, and end together.

Every process runs the same program on the same numbers. The first one alone writes and prints.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import checks

# Seconds without a sign of life after which a process counts as dead. One that ends is noticed at
# once, because its connections break; this is for a machine that vanishes.
HEARTBEAT_TIMEOUT = 30

# What errors have in them that mean the loss of another process: on CPUs, on GPUs, and of the
# service through which processes meet.
LOST = ("Gloo", "NCCL", "oordination service")


def join(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Connects this process with the others of its job, before anything touches a device.

  What is None, SLURM, Open MPI or Kubernetes say. Raises ValueError if they do not, or if the
  others cannot be reached.
  """
  detect = None in (coordinator_address, num_processes, process_id)
  # It would take SIGTERM, which the training loop handles itself.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      cluster_detection_method=None if detect else "deactivate",
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"could not join the other processes: {checks.first_line(error)}\n"
      "expected --coordinator_address=HOST:PORT of process 0, --num_processes and --process_id, or "
      "a job of SLURM, Open MPI or Kubernetes"
    ) from error
  if not is_first():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open as long as the process)


def is_first() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def any_of_them(flag: bool) -> bool:
  """Whether `flag` is set in any process. All of them must ask."""
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def share(work: Sequence) -> Sequence:
  """The part of `work` that this process does: every n-th of n processes."""
  return work[jax.process_index() :: jax.process_count()]


def sum_of(values: np.ndarray) -> np.ndarray:
  """The sum of what all processes have, on each of them. All of them must ask."""
  return multihost_utils.process_allgather(values).sum(axis=0)


def end(code: int) -> NoReturn:
  """Ends this process after an error, without the wait for the others of an ordinary exit.

  They wait for this one themselves, until its connections break.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def explain(error: Exception) -> str | None:
  """What to tell the user about `error` if it is the loss of another process; else None."""
  text = str(error)
  if not jax.distributed.is_initialized() or not any(word in text for word in LOST):
    return None
  return (
    f"process {jax.process_index()} of {jax.process_count()} lost another one, whose own messages "
    f"say why: {text.strip().splitlines()[0]}\n"
    "the same command on all of them continues from the last checkpoint"
  )
