"""A file imports only from lower layers and its own folder; flax stays in models/."""

import ast
import gc
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = (
  ("types", "checks", "files", "placement", "streams"),
  ("aot",),
  ("diffusion", "losses", "advantages"),
  ("models", "rewards", "data", "worlds"),
  (
    *("methods", "steering", "optim", "sharding", "checkpoint", "metrics", "batching"),
    *("statistics", "features", "guard", "pictures", "state", "update", "command", "processes"),
  ),
  ("system",),
  (
    *("run", "source", "evaluation", "train", "evaluate", "sample", "export"),
    *("feeds", "pretrain", "rehearsal", "reward_model", "least_work"),
    *("described_rehearsal", "precision"),
  ),
  ("main", "benchmarks"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

# Files that may import from another folder of their layer, inside a function only, and why.
INSIDE_A_FUNCTION = {
  ("rewards/shapes.py", "worlds"): "the judge pulls in scipy, which other rewards do without",
  ("rewards/learned.py", "models"): "a network as a reward; importing rewards does not need flax",
  ("data/prompts.py", "worlds"): "its grammar is one prompt set among files of any origin",
  ("data/shapes_preferences.py", "worlds"): "the judge labels its pairs",
  ("data/shapes_preferences.py", "system"): "it is a command, and samples its pairs itself",
  ("data/shapes_preferences.py", "pictures"): "it stores what it samples",
  ("data/shapes_preferences.py", "command"): "it is a command, and runs as the others do",
}

# Folders or files that own a heavy or opinionated dependency; nobody else imports it.
OWNERS = {
  "flax": {"models"},
  "safetensors": {"models"},
  "orbax": {"checkpoint"},
  # data: the command data/shapes_preferences.py defines flags, inside a function.
  "absl": {"command", "evaluate", "sample", "source", "export", "main", "data", "benchmarks"},
  # benchmarks: PyTorch is what the speed is compared with, inside functions.
  "torch": {"benchmarks"},
  "tensorflow": set(),
}


def sources():
  return sorted((ROOT / "jaxalign").rglob("*.py"))


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
  """Yields (dotted name, whether it is at module level) of every import, relative ones resolved."""
  inside = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = folder[: len(folder) - node.level + 1]
        base = ".".join([*parents, *filter(None, [node.module])])
      # `from jaxalign import losses` names a module only together with the alias.
      names = [f"{base}.{alias.name}" for alias in node.names]
    else:
      continue
    yield from ((name, id(node) not in inside) for name in names)


def violations(relative, text):
  """What a file of jaxalign at path `relative` imports and should not."""
  owner = relative.parts[0].removesuffix(".py")
  if owner == "__init__":
    owner_layer = -1  # `import jaxalign` must stay free
  elif owner in LAYER_OF:
    owner_layer = LAYER_OF[owner]
  else:
    return [f"{relative}: {owner} has no layer; give it one in this test"]
  in_folder = len(relative.parts) > 1
  folder = ["jaxalign", *relative.parts[:-1]]
  found = []
  for name, at_top in imports(parse(text), folder):
    package, *rest = name.split(".")
    if package in OWNERS and owner not in OWNERS[package]:
      found.append(f"{relative}: imports {name}; only {OWNERS[package] or 'tests'} may")
    if package != "jaxalign" or not rest or rest[0] == owner:
      continue
    target = rest[0]
    if target not in LAYER_OF:
      found.append(f"{relative}: imports {name}, which has no layer")
      continue
    same_layer = LAYER_OF[target] == owner_layer
    allowed = LAYER_OF[target] < owner_layer or (same_layer and not in_folder)
    if not allowed and not at_top:
      allowed = (relative.as_posix(), target) in INSIDE_A_FUNCTION
    if not allowed:
      found.append(f"{relative}: imports {name}, of layer {LAYER_OF[target]}, from {owner_layer}")
  return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT / "jaxalign")))
def test_a_file_imports_only_from_below(path):
  assert not violations(path.relative_to(ROOT / "jaxalign"), path.read_text())


@pytest.mark.parametrize(
  "relative, text",
  [
    ("losses/a.py", "import flax"),
    ("losses/a.py", "from flax import linen"),
    ("losses/a.py", "from jaxalign import models"),
    ("losses/a.py", "from jaxalign.models import lora"),
    ("losses/a.py", "def f():\n  import jaxalign.models.lora"),
    ("losses/a.py", "from ..models import lora"),
    ("losses/a.py", "from jaxalign.diffusion import rollout"),  # same layer, another folder
    ("methods/a.py", "from jaxalign import update"),  # same layer, top level
    ("methods/a.py", "from jaxalign.train import train"),
    ("optim.py", "from jaxalign import system"),
    ("rewards/shapes.py", "from jaxalign.worlds.shapes import judge"),  # not inside a function
    ("rewards/jpeg.py", "def f():\n  from jaxalign.worlds.shapes import judge"),
    ("types.py", "from jaxalign import advantages"),
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
    ("models/unet.py", "import flax.linen as nn\nfrom jaxalign.models import layers"),
    ("models/weights/a.py", "from . import names\nfrom ..lora import init"),
    ("update.py", "from jaxalign import methods, optim\nfrom jaxalign.state import TrainState"),
    ("rewards/shapes.py", "def f():\n  from jaxalign.worlds.shapes import judge"),
    ("main.py", "from jaxalign import train\nfrom absl import flags"),
  ],
)
def test_the_check_lets_the_rest_pass(relative, text):
  assert not violations(pathlib.PurePosixPath(relative), text)


def test_every_exception_is_still_used():
  for relative, target in INSIDE_A_FUNCTION:
    path = ROOT / "jaxalign" / relative
    names = [name for name, _ in imports(parse(path.read_text()), ["jaxalign", path.parent.name])]
    used = any(f"{name}.".startswith(f"jaxalign.{target}.") for name in names)
    assert used, f"{relative} no longer imports {target}"


def test_configs_never_import_jaxalign():
  paths = sorted((ROOT / "configs").rglob("*.py"))
  assert paths
  for path in paths:
    names = [name for name, _ in imports(parse(path.read_text()), ["configs"])]
    assert not [name for name in names if name.split(".")[0] == "jaxalign"], path


def test_the_mathematics_imports_with_jax_alone():
  program = """
import sys
for name in ("flax", "optax", "orbax", "transformers", "safetensors", "PIL", "absl", "torch"):
  sys.modules[name] = None  # makes its import an ImportError
from jaxalign import advantages, losses, methods
from jaxalign.diffusion import guidance, rollout, schedules, transitions
print(losses.clipped_pg_loss.__name__)
"""
  run = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
  )
  assert run.stdout.strip() == "clipped_pg_loss", run.stderr
