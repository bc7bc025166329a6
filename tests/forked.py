"""Commands of the package as processes that need not import it again, which takes seconds each.

Python's server of forks imports this file, and with it nearly all that commands import. A command
is a fork of it: a process with its own flags, folder, output and status, in which the module runs
as `python -m` runs it.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys

import jaxalign.recipes.shapes_reward
import jaxalign.training.described_dry_run  # noqa: F401

_context = multiprocessing.get_context("forkserver")


def serve(environment: dict[str, str]) -> None:
  """Starts the server, unless it runs; commands have its environment."""
  ours = dict(os.environ)
  os.environ.update(environment)
  try:
    _context.set_forkserver_preload([__name__])
    multiprocessing.forkserver.ensure_running()
  finally:
    os.environ.clear()
    os.environ.update(ours)


class Command:
  """A command that has been started; of `subprocess.Popen` what tests use.

  Its output goes to files beside `output`.
  """

  def __init__(self, module: str, flags: tuple[str, ...], *, cwd, output):
    self._files = [output.with_suffix(suffix) for suffix in (".out", ".err")]
    args = (module, flags, cwd, self._files)
    self._process = _context.Process(target=_run, args=args)
    self._process.start()

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  def poll(self) -> int | None:
    return self.returncode

  def send_signal(self, number: int) -> None:
    os.kill(self._process.pid, number)

  def wait(self, timeout: float | None = None) -> int:
    self._process.join(timeout)
    if self.returncode is None:
      self._process.kill()
      raise subprocess.TimeoutExpired(self._process.name, timeout)
    return self.returncode

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    """What it printed and its errors, after its end."""
    self.wait(timeout)
    printed, errors = (file.read_text() for file in self._files)
    return printed, errors


def _run(module, flags, cwd, files):
  for number, file in zip((1, 2), files, strict=True):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  os.chdir(cwd)
  sys.path.insert(0, str(cwd))  # as -m does
  sys.argv = [module, *flags]
  runpy.run_module(module, run_name="__main__", alter_sys=True)
