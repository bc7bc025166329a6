"""All of jaxalign in one Python: commands imported, reloaded, and called as functions."""

import ast
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxalign
from jaxalign import evaluate, export, files, sample, system, train
from jaxalign.cli import command, configs
from jaxalign.evaluation import precision
from jaxalign.training import checkpoint, guard, metrics
from jaxalign.training import workdir as workdir_lib

PACKAGE = pathlib.Path(jaxalign.__file__).parent
COMMANDS = sorted(
  ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
  for path in PACKAGE.rglob("*.py")
  if "__main__" in path.read_text() and "define_flags" in path.read_text()
  if path.parent.name != "cli"
)
PROGRAM = f"""
import importlib, sys
from absl import flags, app, logging
import orbax.checkpoint
before = set(flags.FLAGS)
modules = [importlib.import_module(name) for name in {COMMANDS}]
for module in modules:
  importlib.reload(module)
assert set(flags.FLAGS) == before, set(flags.FLAGS) - before
"""


def test_commands_share_a_process():
  """Flags of one name are defined in each, when it runs: an import defines none."""
  assert len(COMMANDS) >= 8 and "jaxalign.main" in COMMANDS
  run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", [sample, evaluate, export])
def test_a_command_says_what_its_flags_are(module):
  usage = command.usage(module.define_flags)
  for name in ("--model", "--workdir", "--[no]debug"):
    assert name in usage


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir, as a text, of a run that was started as a function."""
  workdir = str(tmp_path_factory.mktemp("notebook") / "run")
  config = configs.load("ddpo_gaussian:quicktest", ["num_iterations=1", "samples.every=0"])
  train.train(config, workdir)
  return workdir


def test_functions_of_commands_take_plain_arguments(run, tmp_path, capsys):
  found = workdir_lib.load(run)
  samples = sample.draw(found.system, found.params, [{}] * 2, seed=3)
  (path,) = sample.write(samples, str(tmp_path / "drawn"), found.system.model.modality, "npy")
  np.testing.assert_array_equal(np.load(path), samples)
  comparison = evaluate.evaluate_run(run, changes={"num_samples": 8})
  assert len(comparison.evaluation.ids) == 8
  export.write(export.of_run(found), str(tmp_path / "exported"))
  opened = system.make_system(
    seed=0, model={"path": str(tmp_path / "exported")}, lora=system.NO_LORA,
    process=found.config["process"], guidance={"scale": 1.0},
  )  # fmt: skip
  again = sample.draw(opened, opened.policy.params, [{}] * 2, seed=3)
  np.testing.assert_allclose(again, samples, atol=1e-5)
  capsys.readouterr()


class Place:
  """A path of someone else's class, as those of a cluster's file system are."""

  def __init__(self, path):
    self.path = path

  def __fspath__(self):
    return str(self.path)


def forms(path):
  return str(path), pathlib.Path(path), Place(path)


READERS = {
  "the run": workdir_lib.load,
  "its numbers": metrics.read,
  "its checkpoint": checkpoint.read_latest,
  "its guard": guard.kept,
  "its rounding": precision.recorded_kl,
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_run_takes_any_path(name, run):
  """As users of pathlib expect of whatever takes a text (Parsl/parsl#3303)."""
  found = [READERS[name](form) for form in forms(run)]
  assert len({repr(type(one)) for one in found}) == 1


def test_what_writes_takes_any_path(run, tmp_path):
  found = workdir_lib.load(Place(run))
  modality, points = found.system.model.modality, np.zeros((1, 2), np.float32)
  for number, form in enumerate(forms(tmp_path / "out")):
    assert sample.write(points, form, modality)
    folder = tmp_path / f"exported {number}"
    export.write(export.of_run(found), Place(folder))
    assert files.read_json(Place(folder / export.RECORD))["iteration"] == 1
  for form in forms(tmp_path / "run"):
    config = configs.load("ddpo_gaussian:quicktest")
    with workdir_lib.prepared(form, config):
      assert (tmp_path / "run" / "config.json").is_file()


# Of readers of data and of what a model's files say; they have tests of their own.
APART = ("data", "models/identity", "modalities/image.py")


def functions(tree):
  """The public functions of a module and of its public classes."""
  for node in tree.body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from functions(node)
    elif isinstance(node, ast.FunctionDef) and (
      not node.name.startswith("_") or node.name == "__init__"
    ):
      yield node


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p)[-40:])
def test_no_function_asks_for_one_kind_of_path(path):
  if path.relative_to(PACKAGE).as_posix().startswith(APART):
    return
  for function in functions(ast.parse(path.read_text())):
    arguments = function.args
    for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
      asked = ast.unparse(one.annotation) if one.annotation else ""
      assert "pathlib.Path" not in asked, f"{function.name}({one.arg}: {asked})"


def test_a_message_of_whatever_length_is_three_lines():
  error = ValueError("\n".join(f"line {n} " + "x" * 400 for n in range(50)) + "\x1b[31m\0 the end")
  message = command.explain(error)
  assert len(message.splitlines()) <= 3 and len(message) <= 900
  assert message.startswith("line 0 ") and message.endswith("\\x1b[31m\\x00 the end")
  assert command.explain(ValueError()) == "ValueError"
  assert command.explain(MemoryError("unable to allocate 7 TiB")).startswith("out of memory")
  assert command.explain(KeyError("ours")) is None
