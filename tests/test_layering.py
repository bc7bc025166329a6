"""A file imports only from lower floors and its own folder; flax stays in models/."""

import ast
import gc
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Files and folders of jaxalign/, lowest first: each imports from those before it, the root's too.
FLOORS = (
  *("types", "checks", "files", "streams"),
  *("distributed", "aot"),
  *("diffusion", "losses", "labels", "modalities"),
  *("worlds", "data", "models", "rewards", "pipeline", "steering", "methods"),
  *("system", "training", "evaluation", "cli"),
  *("train", "evaluate", "sample", "export"),
  *("recipes", "main", "benchmarks"),
)
FLOOR_OF = {name: number for number, name in enumerate(FLOORS)}

# Folders or files that own a heavy or opinionated dependency; nobody else imports it.
OWNERS = {
  "flax": {"models"},
  "safetensors": {"models"},
  "orbax": {"training"},
  # recipes: some are commands, which define flags inside a function.
  "absl": {"cli", "evaluate", "sample", "export", "main", "recipes", "benchmarks"},
  # benchmarks: PyTorch is what the speed is compared with, inside functions.
  "torch": {"benchmarks"},
  "tensorflow": set(),
}


def sources():
  return sorted((ROOT / "jaxalign").rglob("*.py"))


def relative_to_package(path):
  return path.relative_to(ROOT / "jaxalign")


def parse(text):
  """`ast.parse` without the garbage collector, whose callbacks make Python 3.11 lose its depth.

  It then raises "SystemError: AST constructor recursion depth mismatch" now and then.
  """
  gc.disable()
  try:
    return ast.parse(text)
  finally:
    gc.enable()


def imports(tree, folder):
  """Yields the dotted name of every import, inside functions too, relative ones resolved."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = folder[: len(folder) - node.level + 1]
        base = ".".join([*parents, *filter(None, [node.module])])
      # `from jaxalign import losses` names a module only together with the alias.
      yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(relative, text):
  """What a file of jaxalign at path `relative` imports and should not."""
  owner = relative.parts[0].removesuffix(".py")
  if owner == "__init__":
    floor = -1  # `import jaxalign` must stay free
  elif owner in FLOOR_OF:
    floor = FLOOR_OF[owner]
  else:
    return [f"{relative}: {owner} has no floor; give it one in this test"]
  folder = ["jaxalign", *relative.parts[:-1]]
  found = []
  for name in imports(parse(text), folder):
    package, *rest = name.split(".")
    if package in OWNERS and owner not in OWNERS[package]:
      found.append(f"{relative}: imports {name}; only {OWNERS[package] or 'tests'} may")
    if package != "jaxalign" or not rest or rest[0] == owner:
      continue
    if rest[0] not in FLOOR_OF:
      found.append(f"{relative}: imports {name}, which has no floor")
    elif FLOOR_OF[rest[0]] >= floor:
      found.append(f"{relative}: imports {name}, which is above {owner}")
  return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(relative_to_package(p)))
def test_a_file_imports_only_from_below(path):
  assert not violations(relative_to_package(path), path.read_text())


@pytest.mark.parametrize(
  "relative, text",
  [
    ("losses/a.py", "import flax"),
    ("losses/a.py", "from flax import linen"),
    ("losses/a.py", "from jaxalign import models"),
    ("losses/a.py", "from jaxalign.models.adapters import lora"),
    ("losses/a.py", "def f():\n  import jaxalign.models.adapters.lora"),
    ("losses/a.py", "from ..models import adapters"),
    ("losses/a.py", "from jaxalign.labels import advantages"),
    ("methods/a.py", "from jaxalign.training import update"),
    ("methods/a.py", "from jaxalign.train import train"),
    ("sample.py", "from jaxalign import export"),  # the root has floors too
    ("types.py", "from jaxalign import checks"),
    ("train.py", "from jaxalign import helpers"),
    ("helpers.py", "import os"),
    ("train.py", "import orbax.checkpoint as ocp"),
    ("__init__.py", "from jaxalign import types"),
  ],
)
def test_the_check_sees_a_violation(relative, text):
  assert len(violations(pathlib.PurePosixPath(relative), text)) == 1


@pytest.mark.parametrize(
  "relative, text",
  [
    ("models/networks/unet.py", "import flax.linen as nn\nfrom jaxalign.models import weights"),
    ("models/weights/a.py", "from . import names\nfrom ..adapters import lora"),
    ("training/update.py", "from jaxalign import methods\nfrom jaxalign.training import state"),
    ("rewards/shapes.py", "def f():\n  from jaxalign.worlds.shapes import judge"),
    ("main.py", "from jaxalign import train\nfrom absl import flags"),
  ],
)
def test_the_check_lets_the_rest_pass(relative, text):
  assert not violations(pathlib.PurePosixPath(relative), text)


def test_every_floor_is_there_and_the_root_is_small():
  there = {path.parts[0].removesuffix(".py") for path in map(relative_to_package, sources())}
  assert there == {*FLOORS, "__init__"}
  assert len([path for path in sources() if len(relative_to_package(path).parts) == 1]) <= 13


def test_configs_never_import_jaxalign():
  paths = sorted((ROOT / "configs").rglob("*.py"))
  assert paths
  for path in paths:
    names = list(imports(parse(path.read_text()), ["configs"]))
    assert not [name for name in names if name.split(".")[0] == "jaxalign"], path


@pytest.mark.parametrize(
  "absent, modules",
  [
    (
      ("flax", "optax", "orbax", "transformers", "safetensors", "PIL", "absl", "torch", "scipy"),
      ("losses", "methods", "labels.advantages", "diffusion.rollout", "diffusion.guidance"),
    ),
    # A reward of one's own needs no network, and prompts no judge.
    (("flax", "optax", "orbax", "transformers", "scipy"), ("rewards.combine", "data.records")),
  ],
  ids=["mathematics", "rewards"],
)
def test_imports_do_without_what_they_do_not_need(absent, modules):
  program = f"""
import importlib, sys
for name in {absent}:
  sys.modules[name] = None  # makes its import an ImportError
for name in {modules}:
  importlib.import_module("jaxalign." + name)
"""
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
  assert run.returncode == 0, run.stderr
