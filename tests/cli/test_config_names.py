"""--config=NAME: those that come with jaxalign, and files of one's own, from any folder."""

import os
import pathlib
import subprocess
import sys

import pytest

from jaxalign.cli import command, configs

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)  # as python -m does
  return tmp_path


def refused(name):
  with pytest.raises(ValueError) as error:
    configs.load(name)
  message = command.explain(error.value)
  assert 1 <= len(message.splitlines()) <= 3 and len(message) <= 900
  assert "earlier failure" not in message
  return message


def test_a_name_is_found_from_any_folder(here):
  assert {"ddpo", "dpo", "kto_planner"} <= set(configs.names())
  assert "common" not in configs.names() and "flows" not in configs.names()
  assert configs.load("ddpo").num_iterations == 18
  assert configs.load("ddpo:lora,quicktest").lora.rank == 16
  assert configs.load("ddpo").is_locked
  assert not [path for path in sys.path if path == str(configs.FOLDER.parent / "jaxalign")]


def test_ours_are_ours_whatever_is_called_configs_here(here):
  """A folder of that name is common, and hides a package's own (RuchiTanmay/nselib#100)."""
  (here / "configs").mkdir()
  (here / "configs" / "common.py").write_text("raise RuntimeError('theirs')\n")
  (here / "ddpo.py").write_text("raise RuntimeError('theirs')\n")
  assert configs.load("ddpo").num_iterations == 18
  assert "theirs" in refused("ddpo.py") and "ddpo.py, line 1" in refused("./ddpo.py")
  (here / "configs" / "__init__.py").write_text("")
  assert configs.load("dpo").num_iterations == 60


def test_a_file_of_ones_own_shares_ours_and_has_its_own_beside(here):
  (here / "mine").mkdir()
  file = here / "mine" / "small.py"
  file.write_text(
    "from configs import common\n\n"
    "def get_config(variant=''):\n"
    "  config = common.shapes(num_iterations=3, learning_rate=1e-3)\n"
    "  return common.with_variants(config, 'small.py', variant, {'slow': {'seed': 7}})\n"
  )
  assert configs.load("mine/small.py").num_iterations == 3
  assert configs.load(f"{file}:slow").seed == 7
  (here / "a:b").mkdir()
  (here / "a:b" / "small.py").write_text(file.read_text())
  assert configs.load("a:b/small.py:slow").seed == 7
  (here / "configs").mkdir()
  (here / "configs" / "own.py").write_text("RATE = 0.5\n")
  file.write_text(file.read_text().replace("import common", "import common, own"))
  assert configs.load("mine/small.py").seed == 0
  assert "configs.own" not in sys.modules
  file.write_text("def get_config():\n  return {'flow': 'align', 'optim': {'b1': 0.5}}\n")
  assert configs.load("mine/small.py").optim.b1 == 0.5


@pytest.mark.parametrize("name, words", [
  ("dppo", ("no config 'dppo'", 'did you mean "dpo"?')),
  ("xyzzy", ("known: d3po, ddpo",)),
  ("common", ("no config 'common'",)),
  ("ddpo.py", ("no such file: ddpo.py", "--config=ddpo is the one that comes with jaxalign")),
  ("configs/ddpo.py", ("no such file", "--config=ddpo is the one")),
  ("missing.py", ("no such file: missing.py",)),
  ("folder/", ("found a folder",)),
  ("ddpo:lorra", ("unknown variant 'lorra'", "known: long, lora")),
  ("pretrain_shapes:long", ("get_config expects no variant, got 'long'",)),
  ("", ("no config ''",)),
  ("x" * 3000, ("no config 'xxx",)),
])
def test_a_name_that_nothing_has(here, name, words):
  (here / "folder").mkdir()
  for word in words:
    assert word in refused(name)


@pytest.mark.parametrize("text, words", [
  ("def get_config(:\n", ("bad.py, line 1: SyntaxError",)),
  ("x = 1\nraise KeyError('lost')\n", ("bad.py, line 2: KeyError: 'lost'",)),
  ("def get_config():\n  return 1 / 0\n", ("bad.py, line 2: ZeroDivisionError",)),
  ("import no_such_thing\n", ("bad.py, line 1: ModuleNotFoundError",)),
  ("import sys\nsys.exit(0)\n", ("bad.py, line 2: sys.exit(0)",)),
  ("def get_config():\n  exit()\n", ("bad.py, line 2: sys.exit()",)),
  ("def get_config():\n  input('which? ')\n", ("line 2: EOFError", "has none to give")),
  ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n", ("line 2: sys.exit(2)",)),
  ("class Odd(BaseException): pass\nraise Odd('y' * 5000)\n", ("bad.py, line 2: Odd: yyy",)),
  ("def getconfig(): ...\n", ("expected a function get_config()", 'did you mean "getconfig"?')),
  ("get_config = 3\n", ("expected a function get_config()",)),
  ("def get_config():\n  c = {}\n", ("got NoneType; is there no return?",)),
  ("def get_config(): return [1]\n", ("expected get_config() to return a ConfigDict, got list",)),
  ("def get_config(a, b): ...\n", ("get_config expects a variant",)),
  ("def get_config(): return {'a.b': 1}\n", ("ValueError",)),
  ("def f(): f()\ndef get_config(): f()\n", ("RecursionError",)),
  ("\0", ("bad.py",)),
])
def test_a_file_that_is_no_config(here, text, words):
  (here / "bad.py").write_text(text)
  for word in words:
    assert word in refused("bad.py")


def test_an_installed_package_has_its_configs_and_files(here):
  """As a wheel has it (CERT-Polska/hfinger#1): built apart, and asked from an empty folder."""
  build = ["build_py", "--build-lib", here / "built", "egg_info", "--egg-base", here]
  subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True)
  built = here / "built" / "jaxalign"
  assert {path.name for path in (built / "configs").glob("*.py")} >= {"common.py", "ddpo.py"}
  for path in (ROOT / "jaxalign").rglob("*"):
    if path.is_file() and "__pycache__" not in path.parts:
      assert (built / path.relative_to(ROOT / "jaxalign")).is_file(), path
  (here / "empty").mkdir()
  program = (
    "import sys\nfrom jaxalign.cli import configs\n"
    "assert configs.load('ddpo:lora').lora.rank == 16\n"
    "assert str(configs.FOLDER) == sys.argv[1] and 'configs' not in sys.modules\n"
  )
  environment = {**os.environ, "PYTHONPATH": str(here / "built")}
  run = [sys.executable, "-c", program, str(built / "configs")]
  subprocess.run(run, cwd=here / "empty", env=environment, check=True)


def test_bytes_that_are_no_text(here):
  (here / "bad.py").write_bytes(b"x = '\xff\xfe'\n")
  assert "SyntaxError" in refused("bad.py")
