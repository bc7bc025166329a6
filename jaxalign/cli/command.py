"""How a command starts and ends: compiled programs are kept between commands, and a user's mistake
is a message of a few lines, never a traceback.
"""

import math
import os
import pathlib
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

import jax
import jaxlib.version
from absl import app, flags, logging

from jaxalign.distributed import hosts

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

# What a user can cause and mend. Anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, flags.Error)

_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Parses flags and calls `main`, like `absl.app.run`, and exits with 1 on an error."""
  choose_cpu_kernels()
  use_compilation_cache()
  say_briefly_what_cannot_be_written()
  logging.set_verbosity(logging.WARNING)  # orbax and jax report every step they take
  # Of an error that orbax raises it also logs the traceback, once in each of its threads.
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
  warnings.showwarning = _show_warning
  try:
    app.run(main, flags_parser=_parse)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    hosts.end(130)
  except Exception as error:
    message = _explain(error)
    if message is None or (flags.FLAGS.is_parsed() and _DEBUG.value):
      traceback.print_exc()
    else:
      print(f"error: {message}", file=sys.stderr)
    hosts.end(1)


def must_be_finite(*names: str) -> None:
  """Has the flags of that name refuse nan and inf, which Python reads as numbers."""
  for name in names:
    flags.register_validator(
      name, lambda value: value is None or math.isfinite(value), "expected a finite number"
    )


def choose_cpu_kernels() -> None:
  """Says which of XLA:CPU's kernels programs take, if called before JAX is first used.

  jaxlib 0.10 to 0.12 prefer kernels of a library for convolutions, which take up to twice as long
  as Eigen's, and up to four times as long for the gradient of a kernel. From 0.11 on they also
  prefer its sums, whose order depends on what a sum is fused with: a rollout and an update then
  differ in the last places of a log-probability, and in bfloat16 in the third.
  """
  major, minor = jaxlib.version.__version_info__[:2]
  flags_so_far = os.environ.get("XLA_FLAGS", "")
  # XLA ends a process that gives it a flag it does not know, so other versions are left alone.
  if major == 0 and 10 <= minor <= 12 and _FUSIONS not in flags_so_far:
    refused = "-individual_convolution" if minor == 10 else "-individual_convolution,-reduce"
    os.environ["XLA_FLAGS"] = f"{flags_so_far} --{_FUSIONS}={refused}".strip()


def say_briefly_what_cannot_be_written() -> None:
  """A line for an OSError in a thread or at the very end, where Python shows its traceback.

  Event files are written there: a disk that is full would show two of them beside the error.
  """

  def briefly(show):
    def hook(raised):
      if isinstance(raised.exc_value, OSError):
        print(f"error: {raised.exc_value}", file=sys.stderr)
      else:
        show(raised)

    return hook

  threading.excepthook = briefly(threading.excepthook)
  sys.unraisablehook = briefly(sys.unraisablehook)


def make_configs_importable() -> None:
  """Lets config files import `configs.common` wherever a command starts.

  `configs` stands beside the package in a clone, and Python looks for modules in the working
  directory, which may be another. Last in the search, so that it hides no module of the user's.
  """
  clone = str(pathlib.Path(__file__).resolve().parents[2])
  if clone not in sys.path:
    sys.path.append(clone)


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where already."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jaxalign", "xla"))


def _show_warning(
  message: Warning | str,
  category: type[Warning],
  filename: str,
  lineno: int,
  file: TextIO | None = None,
  line: str | None = None,
) -> None:
  """Prints a warning for a user without the line of code it is from, others as Python does."""
  if category is UserWarning:
    told = f"warning: {message}\n"
  else:
    told = warnings.formatwarning(message, category, filename, lineno, line)
  (file or sys.stderr).write(told)


def _explain(error: Exception) -> str | None:
  """What to tell the user; None for an error that is not theirs to mend."""
  lost = hosts.explain(error)
  if lost is not None:
    return lost
  if isinstance(error, USER_ERRORS):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Long messages come from libraries: the first line says what failed, the last one why.
    return "\n".join(lines if len(lines) <= 3 else [lines[0], lines[-1].strip()])
  if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return "the device is out of memory; lower config.batch.microbatch, or --microbatch"
  return None


def _parse(argv: Sequence[str]) -> Sequence[str]:
  try:
    rest = flags.FLAGS(argv)
  except (AttributeError, KeyError, TypeError) as error:  # a locked config refuses a key
    raise flags.Error(f"config: {error.args[0] if error.args else error}") from error
  if len(rest) > 1:
    raise flags.Error(f"expected flags only, got {' '.join(rest[1:])}")
  return rest
