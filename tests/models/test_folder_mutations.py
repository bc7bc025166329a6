"""Model folders changed at random are opened, or refused in a few lines; they stay as they are."""

import hashlib
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_models

from jaxalign.models import families
from jaxalign.models.families import stable_diffusion

COUNT, FAST = 2000, 75
LONGEST = 1500  # characters of an error
KINDS = ("sd1", "xl")
VALUES = (
  *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e-320, 1e308, 10**30, 2**31, float("nan")),
  *("", "x", "silu", "DDIMScheduler", "x" * 5000, "a\nb\nc\nd\ne", "\ud800", "\0"),
  *([], [1], [8, 16], [8, None], ["DownBlock2D"], [[1]], {}, {"a": 1}, [1] * 1000),
)
WORDS = ("_class_name", "sample_size", "later_option", "decay", "", "é", "quantization_config")
DTYPES = (np.float16, np.float64, np.int8, np.int64, np.uint8, bool)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """Folders of a random model of each kind."""
  folders = []
  for kind in KINDS:
    folders.append(tmp_path_factory.mktemp(kind) / "model")
    tokenizers = tmp_path_factory.mktemp("tokenizers")
    stable_diffusion.save(small_models.make(kind, tokenizers), folders[-1])
  return folders


def pick(rng, entries):
  return entries[rng.integers(len(entries))]


def change_json(rng, file):
  """A field dropped, renamed, added or given another value, at the top or one level down."""
  whole = json.loads(file.read_text())
  inside = [value for value in whole.values() if isinstance(value, dict) and value]
  fields = pick(rng, inside) if inside and rng.random() < 0.2 else whole
  name = pick(rng, list(fields))
  kind = pick(rng, ("drop", "rename", "value", "value", "value", "add"))
  value = fields[name]
  if kind in ("drop", "rename"):
    del fields[name]
  if kind == "rename":
    at = int(rng.integers(len(name)))
    fields[name[:at] + pick(rng, ("", "x", "_")) + name[at + 1 :]] = value
  elif kind == "value":
    fields[name] = pick(rng, VALUES)
  elif kind == "add":
    fields[pick(rng, WORDS)] = pick(rng, VALUES)
  file.write_text(json.dumps(whole))


def change_text(rng, file):
  """Lines of merges.txt dropped, swapped, doubled or spoilt."""
  lines = file.read_text().split("\n")
  at, other = rng.integers(len(lines), size=2)
  kind = pick(rng, ("drop", "swap", "twice", "word"))
  if kind == "drop":
    del lines[at]
  elif kind == "swap":
    lines[at], lines[other] = lines[other], lines[at]
  elif kind == "twice":
    lines.insert(at, lines[other])
  else:
    lines[at] = pick(rng, ("", "a", "a b c", "zz qq", "\u2028 x", "é é"))
  file.write_text("\n".join(lines))


def change_tensors(rng, file):
  """Tensors dropped, renamed, reshaped, recast, transposed, spoilt or added."""
  tensors = dict(safetensors.numpy.load_file(file))
  name = pick(rng, sorted(tensors))
  kind = pick(rng, ("drop", "rename", "reshape", "recast", "transpose", "spoil", "add"))
  array = tensors[name]
  if kind in ("drop", "rename"):
    del tensors[name]
  if kind == "rename":
    at = int(rng.integers(len(name)))
    tensors[name[:at] + pick(rng, ("module.", "_orig_mod.", "x", "")) + name[at:]] = array
  elif kind == "reshape":
    tensors[name] = np.ones(tuple(rng.integers(0, 9, size=rng.integers(0, 6))), np.float32)
  elif kind == "recast":
    with np.errstate(invalid="ignore", over="ignore"):
      tensors[name] = array.astype(pick(rng, DTYPES))
  elif kind == "transpose":
    tensors[name] = np.ascontiguousarray(array.T)
  elif kind == "spoil":
    tensors[name] = np.array(array)
    tensors[name].flat[0] = pick(rng, (np.nan, np.inf, 3e38))
  elif kind == "add":
    tensors[pick(rng, ("extra.weight", "logit_scale", "v_pred", "scaled_fp8"))] = np.ones(2)
  safetensors.numpy.save_file(tensors, file, {"format": "pt"})


def change_bytes(rng, file):
  """Cut off, or with other bytes, most of them near the beginning."""
  content = bytearray(file.read_bytes())
  if rng.random() < 0.4:
    content = content[: rng.integers(len(content) + 1)]
  elif content:
    end = min(len(content), 4000) if rng.random() < 0.8 else len(content)
    for at in rng.integers(0, end, size=rng.integers(1, 6)):
      content[at] = rng.integers(256)
  file.write_bytes(bytes(content))


def change_place(rng, file):
  """Gone, renamed, or a folder in its place."""
  kind = pick(rng, ("gone", "renamed", "folder", "folder is gone"))
  if kind == "folder is gone" and file.parent.name != "model":
    shutil.rmtree(file.parent)
    return
  content = file.read_bytes()
  file.unlink()
  if kind == "renamed":
    file.with_name(pick(rng, ("x", "model.fp16.safetensors", "config.json"))).write_bytes(content)
  elif kind == "folder":
    file.mkdir()


BY_SUFFIX = {".json": change_json, ".txt": change_text, ".safetensors": change_tensors}


def mutate(rng, folder):
  """One to three changes to files of a folder."""
  for _ in range(rng.integers(1, 4)):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
      return
    file, how = pick(rng, files), rng.random()
    try:
      if how < 0.75:
        BY_SUFFIX.get(file.suffix, change_bytes)(rng, file)
      else:
        (change_bytes if how < 0.9 else change_place)(rng, file)
    except (ValueError, AttributeError, IndexError, UnicodeError, safetensors.SafetensorError):
      change_bytes(rng, file)  # an earlier change has left nothing that this one could change


def digests(folder):
  return {
    str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    for path in folder.rglob("*")
  }


def use(folder):
  """All that a command does with a folder before a program is compiled; every weight is read."""
  model = families.open_model(folder)
  model.tokenize([{"prompt": "a red circle"}])
  model.make_process(num_steps=2, transition="ddim", eta=0.0)
  return jax.tree.map(np.asarray, model.params)


def outcomes(seeds, sound, tmp_path):
  """How many were opened; AssertionError for one that is neither opened nor refused in words."""
  opened = 0
  for seed in seeds:
    rng = np.random.default_rng(seed)
    folder = tmp_path / str(seed) / "model"  # tokenizers are kept by path
    shutil.copytree(pick(rng, sound), folder)
    mutate(rng, folder)
    before = digests(folder)
    with warnings.catch_warnings(record=True) as told:
      warnings.simplefilter("always")
      try:
        leaves = jax.tree.leaves(use(folder))
        assert all(np.isfinite(leaf).all() for leaf in leaves), seed
        opened += 1
      except (ValueError, OSError) as error:
        message = str(error).replace(str(folder), "F")
        assert 1 <= len(message.splitlines()) <= 3, (seed, message)
        assert 0 < len(message) <= LONGEST, (seed, message)
      except BaseException as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    for one in told:
      assert len(str(one.message)) <= LONGEST, (seed, str(one.message))
    assert digests(folder) == before, seed
    shutil.rmtree(folder.parent)
  return opened


@pytest.mark.parametrize(
  "seeds", [range(FAST), pytest.param(range(FAST, COUNT), marks=pytest.mark.slow)]
)
def test_a_changed_folder_is_opened_or_refused(seeds, sound, tmp_path):
  assert len(seeds) // 20 < outcomes(seeds, sound, tmp_path) < len(seeds) * 19 // 20
