"""Code of users that exits, reads arguments or input, prints, or raises what it likes."""

import json
import sys

import pytest

from jaxalign import checks
from jaxalign.cli import command

ARGPARSE = """import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--scale", type=float, default=1.0)
args = parser.parse_args()
def near(points, records): return points[:, 0]
"""
GAUSSIAN = (
  "--config=ddpo_gaussian:quicktest", "--config.num_iterations=6", "--config.checkpoint.every=0",
  "--config.reward.names=('mine:near',)", "--workdir=run",
)  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
  """`write(text)`: the module `mine`, in the working directory."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)

  def module(text):
    (tmp_path / "mine.py").write_text(text)

  yield module
  sys.modules.pop("mine", None)


@pytest.mark.parametrize("text, words", [
  ("import sys\nsys.exit()\n", ("as it is imported: sys.exit() in", "mine.py, line 2", "__main__")),
  ("raise SystemExit('bye')\n", ("sys.exit('bye') in", "mine.py, line 1")),
  ("\nexit(0)\n", ("ends the process", "mine.py, line 2")),
  (ARGPARSE, ("ends the process as it is imported: sys.exit(2)", "mine.py, line 4")),
  ("from absl import app\napp.run(print)\n", ("ends the process as it is imported", "line 2")),
  ("answer = input('really? ')\n", ("EOFError", "asks for input", "mine.py, line 1")),
  ("1 / 0\n", ("could not import module \"mine\": ZeroDivisionError", "mine.py, line 1")),
  ("import numpi\n", ("ModuleNotFoundError: No module named 'numpi'", "mine.py, line 1")),
  ("def near(:\n", ("SyntaxError", "mine.py, line 1")),
  ("class Odd(BaseException): pass\nraise Odd\n", ("mine.py, line 2",)),
  ("class Mute(Exception):\n  def __str__(self): 1 / 0\nraise Mute\n", ("Mute:", "line 3")),
  ("raise ValueError('long\\n' * 3000)\n", ("ValueError: long long",)),
  ("def nera(): ...\n", ('has no "near"', 'did you mean "nera"')),
  ("def __getattr__(name): raise RuntimeError(name)\n", ("RuntimeError: near",)),
  ("near = 3\n", ("expected a function, got int",)),
])
def test_a_module_that_cannot_be_imported(write, text, words, monkeypatch):
  """Arguments read on import are those of another program (MemPalace/mempalace#2528)."""
  write(text)
  monkeypatch.setattr(sys, "argv", ["main.py", "--config=ddpo"])  # of a command
  before = sys.stdin
  with pytest.raises(ValueError) as error:
    checks.load_function("reward", "mine:near")
  message = command.explain(error.value)
  assert message.startswith('reward "mine:near": ') and len(message) <= 900
  assert 1 <= len(message.splitlines()) <= 3
  for word in words:
    assert word in message
  assert sys.stdin is before


def test_what_a_module_prints_is_no_result(write, capsys):
  write("print('loading')\ndef near(points, records): return points[:, 0]\n")
  assert checks.load_function("reward", "mine:near").__name__ == "near"
  assert capsys.readouterr() == ("", "loading\n")


def test_an_interrupt_is_none_of_its_errors(write):
  write("raise KeyboardInterrupt\n")
  with pytest.raises(KeyboardInterrupt):
    checks.load_function("reward", "mine:near")


def run(command, tmp_path, *flags):
  """Status, and the message of a run that fails."""
  process = command("main", *GAUSSIAN, *flags, cwd=tmp_path)
  _, errors = process.communicate()
  assert "Traceback" not in errors
  message = errors[errors.index("error: ") :].strip()
  assert process.returncode == 1 and 1 <= len(message.splitlines()) <= 3, errors
  return message, errors


def test_a_module_that_exits_ends_no_run_in_silence(write, command, tmp_path):
  write("import sys\nsys.exit(0)\n")
  message, _ = run(command, tmp_path)
  assert 'module "mine" ends the process as it is imported' in message
  assert not (tmp_path / "run").exists()


def test_a_reward_that_exits_loses_no_iteration(write, command, tmp_path):
  """A run that ended so would be taken for one that is done (determined-ai/determined#1116)."""
  write(
    "import sys\ncalls = []\n"
    "def near(points, records):\n"
    "  calls.append(1)\n"
    "  return points[:, 0] if len(calls) < 9 else sys.exit()\n"
  )
  message, errors = run(command, tmp_path)
  assert 'reward "mine:near" failed: sys.exit() in ' in message and "mine.py, line 5" in message
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert f"iteration {len(rows)} is saved" in errors and 0 < len(rows) < 6
  assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(len(rows))]


@pytest.mark.parametrize("does, words", [
  ("raise SystemExit(0)", "the run was ended by sys.exit(0) in"),
  ("return row.no_such_field", "line 2: AttributeError: "),
  ("return __import__('jax').numpy.sin('a')", "line 2: TypeError: "),
])
def test_a_transition_that_fails_is_named(does, words, write, command, tmp_path):
  write(f"def step(x_t, prediction, row, *, prediction_type):\n  {does}\n")
  process = "--config.process={'transition': 'mine:step', 'num_steps': 2}"
  message, _ = run(command, tmp_path, "--config.reward.names=gaussian_quadratic", process)
  assert words in message and "mine.py, line 2" in message


def test_a_module_may_have_absl_flags_of_any_name(write, command, tmp_path):
  """Those of commands are not among them; its own have their defaults."""
  write(
    "from absl import flags\nSCALE = flags.DEFINE_float('config', 2.0, '')\n"
    "def near(points, records): return SCALE.value * points[:, 0]\n"
  )
  flags = (*GAUSSIAN, "--config.num_iterations=1", "--dry_run")
  process = command("main", *flags, cwd=tmp_path)
  printed, errors = process.communicate()
  assert process.returncode == 0 and "rollout" in printed, errors
