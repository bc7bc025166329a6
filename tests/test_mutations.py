"""Mutation test: every deliberate bug of `mutations` is made, and the suite has to notice it.

  pytest -n0 -m slow tests/test_mutations.py

Each takes one process of pytest on one or two files. The default suite only checks that the table
still fits the source.
"""

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import mutations
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxalign"
FAILED = 1  # pytest's status where tests ran and some failed; an error in collecting is another


def by_name(mutant):
  return mutant.name.replace(" ", "_")


@pytest.mark.parametrize("mutant", mutations.MUTANTS, ids=by_name)
def test_the_table_fits_the_source(mutant):
  text = (PACKAGE / mutant.file).read_text()
  mutated = mutant.apply(text)
  assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
  assert mutant.tests and all((ROOT / "tests" / file).is_file() for file in mutant.tests)


def test_every_mutant_is_another_one():
  assert len({mutant.name for mutant in mutations.MUTANTS}) == len(mutations.MUTANTS)
  changes = {(mutant.file, mutant.old, mutant.new) for mutant in mutations.MUTANTS}
  assert len(changes) == len(mutations.MUTANTS)
  assert len(mutations.REVIEWED) == 16 and len(changes) >= 26


def copy_project(folder):
  """What tests need of this project, in `folder`; the assets are only linked."""
  leave_out = shutil.ignore_patterns("__pycache__", "assets")
  for name in ("jaxalign", "tests", "configs", "docs"):  # the docs have examples that are run
    shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
  assets = "jaxalign/worlds/assets"
  (folder / assets).symlink_to(ROOT / assets)
  shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder, files):
  """Pytest on files of the copy in `folder`, which stops at the first failure."""
  outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
  return subprocess.run(
    [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider",
     f"--basetemp={folder / 'tmp'}", *(f"tests/{file}" for file in files)],
    cwd=folder,
    env={**outer, "PYTHONPATH": str(folder)},
    capture_output=True,
    text=True,
    timeout=600,
  )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({f for m in mutations.MUTANTS for f in m.tests}))
def test_the_files_pass_without_a_mutant(file, tmp_path):
  copy_project(tmp_path)
  done = run_tests(tmp_path, [file])
  assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutations.MUTANTS, ids=by_name)
def test_a_mutant_is_noticed(mutant, tmp_path):
  copy_project(tmp_path)
  path = tmp_path / "jaxalign" / mutant.file
  path.write_text(mutant.apply(path.read_text()))
  done = run_tests(tmp_path, mutant.tests)
  assert done.returncode == FAILED, done.stdout
