"""How a command starts and ends: compiled programs are kept between commands, and a user's mistake
is a message of a few lines, never a traceback.
"""

import faulthandler
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import TextIO

import jax
import jaxlib.version
from absl import flags, logging

from jaxalign import checks
from jaxalign.checks import own_code
from jaxalign.checks.text import said
from jaxalign.cli import configs
from jaxalign.distributed import hosts

# What a user can cause and mend. Anything else is our bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError, flags.Error)

HELP = {"--help", "-help", "-h", "--helpfull"}
_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"


Main = Callable[[flags.FlagValues], None]
DefineFlags = Callable[[flags.FlagValues], None]


def run(main: Main, define_flags: DefineFlags) -> None:
  """Runs a command, `main(values)` of the flags that `define_flags(values)` defines.

  The flags come to be here: a notebook may import any commands, and reload them. Exits with 1 on an
  error, and where the user's own code ends the process.
  """
  prepare()
  debug = False
  try:
    if HELP & set(sys.argv[1:]):
      print(usage(define_flags))
      return
    values = parse(define_flags, *sys.argv[1:])
    debug = values.debug
    main(values)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    hosts.end(130)
  except (Exception, SystemExit) as error:
    message = explain(error)
    if message is None or debug:
      traceback.print_exc()
    else:
      print(f"error: {message}", file=sys.stderr)
    hosts.end(1)


def parse(define_flags: DefineFlags, *arguments: str | os.PathLike) -> flags.FlagValues:
  """The flags of a command as they are given, by name: `values.seed`.

    sample.main(command.parse(sample.define_flags, "--model=shapes", "--prompt=a cross"))

  Raises flags.Error for what is no flag, and for values that a flag does not take.
  """
  values = _defined(define_flags)
  given = values.read_flags_from_files([os.fspath(one) for one in arguments], force_gnu=False)
  rest = values(["", *configs.as_overrides(given, values)])[1:]
  if rest:
    raise flags.Error(f"expected flags only, got {checks.cut(' '.join(rest), 200)}")
  return values


def usage(define_flags: DefineFlags) -> str:
  """What a command does, and its flags."""
  what = getattr(sys.modules.get("__main__"), "__doc__", None) or ""
  return f"{what.strip()}\n\nFlags:\n{_defined(define_flags).get_help(include_special_flags=False)}"


def _defined(define_flags: DefineFlags) -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_bool("debug", False, "Show the traceback of an error.", flag_values=values)
  define_flags(values)
  return values


def prepare() -> None:
  """What every command does to its process first."""
  faulthandler.enable()
  choose_cpu_kernels()
  use_compilation_cache()
  say_briefly_what_cannot_be_written()
  flags.FLAGS.mark_as_parsed()  # a library that defines some has its defaults
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)  # orbax and jax report every step they take
  # Of an error that orbax raises it also logs the traceback, once in each of its threads.
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
  warnings.showwarning = _show_warning


def must_be_finite(values: flags.FlagValues, *names: str) -> None:
  """Has the flags of that name refuse nan and inf, which Python reads as numbers."""
  for name in names:
    flags.register_validator(
      name,
      lambda value: value is None or math.isfinite(value),
      "expected a finite number",
      flag_values=values,
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
  message = checks.brief(str(message), lines=12)
  if category is UserWarning:
    told = f"warning: {message}\n"
  else:
    told = warnings.formatwarning(message, category, filename, lineno, line)
  (file or sys.stderr).write(told)


def explain(error: BaseException) -> str | None:
  """What to tell the user, in one to three lines; None for an error that is not theirs to mend."""
  if isinstance(error, SystemExit):
    return own_code.ended(error)
  lost = hosts.explain(error)
  if lost is not None:
    return lost
  if isinstance(error, USER_ERRORS):
    return checks.brief(said(error) or type(error).__name__)
  if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return "the device is out of memory; lower config.batch.microbatch, or --microbatch"
  if isinstance(error, MemoryError):
    return checks.brief(f"out of memory: {error}; lower what the command asks for")
  if own_code.is_theirs(error):
    said_so = f"{own_code.place(error)}: {own_code.in_words(error)}"
    return checks.brief(f"{said_so}\n--debug shows the traceback")
  return None
