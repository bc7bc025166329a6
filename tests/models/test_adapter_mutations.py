"""Adapter files changed at random are applied, or refused in a few lines; they stay as they are."""

import hashlib
import json
import struct
import warnings

import adapter_networks
import jax
import numpy as np
import pytest
from adapter_networks import layers, pair, store

from jaxalign.models.adapters import lora
from jaxalign.models.weights import lora_files

COUNT, FAST = 2000, 300
DTYPES = (np.float16, np.float64, np.int8, np.int64, np.uint8, bool)


@pytest.fixture(scope="module")
def networks():
  return adapter_networks.make()


def originals(networks):
  """Tensors and headers of three sound files: kohya's, PEFT's and a text encoder's."""
  kohya, peft, text = {}, {}, {}
  for number, (name, shape) in enumerate(layers(networks["unet"]).items()):
    a, b = pair(shape, rank=1 + number % 4, seed=number)
    if number % 7 == 0:
      module = "lora_unet_" + name.replace(".", "_")
      kohya |= {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b}
      kohya[f"{module}.alpha"] = np.float32(2.0)
    elif number % 7 == 1:
      module = f"base_model.model.{name}"
      peft |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
  for name, shape in layers(networks["text_encoder"]).items():
    a, b = pair(shape)
    text |= {f"text_encoder.{name}.lora_A.weight": a, f"text_encoder.{name}.lora_B.weight": b}
  header = {"lora_alpha": 8, "alpha_pattern": {"to_q": 4}, "use_rslora": False, "r": 4}
  return [
    (kohya, {"ss_network_alpha": "2", "ss_network_dim": "4"}),
    (peft, {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in header.items()})}),
    (text, {}),
  ]


def rename(rng, tensors, metadata, networks):
  name = rng.choice(list(tensors))
  words = ["module.", "_orig_mod.", "unet.", "text_encoder_2.", "lora_A", ".weight", "0", "é"]
  word = str(rng.choice(words))
  at = int(rng.integers(len(name)))
  cut = int(rng.integers(4))
  tensors[name[:at] + word + name[at + cut :]] = tensors.pop(name)


def move(rng, tensors, metadata, networks):
  """To a name of the network's, of a layer, a norm or another part."""
  name = rng.choice(list(tensors))
  targets = [*layers(networks["unet"]), "conv_norm_out", "mid_block.resnets.0.norm1", "nothing"]
  part = rng.choice(["lora_A.weight", "lora_up.weight", "alpha", "diff_b", "weight", "dora_scale"])
  tensors[f"unet.{rng.choice(targets)}.{part}"] = tensors.pop(name)


def reshape(rng, tensors, metadata, networks):
  name = rng.choice(list(tensors))
  sizes = rng.integers(0, 20, size=rng.integers(0, 6))
  tensors[name] = np.ones(tuple(int(size) for size in sizes), np.float32)


def transpose(rng, tensors, metadata, networks):
  name = rng.choice(list(tensors))
  tensors[name] = np.ascontiguousarray(tensors[name].T)


def recast(rng, tensors, metadata, networks):
  name = rng.choice(list(tensors))
  with np.errstate(invalid="ignore", over="ignore"):
    tensors[name] = tensors[name].astype(DTYPES[rng.integers(len(DTYPES))])


def spoil(rng, tensors, metadata, networks):
  name = rng.choice(list(tensors))
  tensors[name] = np.array(tensors[name])
  value = rng.choice([np.nan, np.inf, 3e38, -np.inf])
  if tensors[name].size and tensors[name].dtype.kind == "f":
    with np.errstate(over="ignore"):
      tensors[name].flat[rng.integers(tensors[name].size)] = value


def drop(rng, tensors, metadata, networks):
  for name in rng.choice(list(tensors), size=rng.integers(1, 4)):
    tensors.pop(name, None)


def describe(rng, tensors, metadata, networks):
  """Says something about the alpha in the header, sense or nonsense."""
  value = rng.choice(["nan", "", "1e400", "-3", "[]", "{", "null", '{"unet.r": {}}', "None", "8"])
  keys = ["lora_alpha", "alpha", "ss_network_alpha", "unet.lora_alpha", "lora_adapter_metadata"]
  metadata[str(rng.choice(keys))] = str(value)


def patterns(rng, tensors, metadata, networks):
  value = rng.choice([1, 0, None, "x", True], size=2).tolist()
  pattern = str(rng.choice(["(", "to_q", "*"]))
  config = {"lora_alpha": value[0], "alpha_pattern": {pattern: value[1]}}
  config["use_rslora"] = [True, "no", None, 1][rng.integers(4)]
  metadata["lora_adapter_metadata"] = json.dumps({f"unet.{k}": v for k, v in config.items()})


def truncate(rng, content):
  return content[: rng.integers(len(content))]


def flip(rng, content):
  """Some bytes of the header, or of all."""
  found = bytearray(content)
  end = struct.unpack("<Q", content[:8])[0] + 8 if rng.random() < 0.8 else len(content)
  for at in rng.integers(0, end, size=rng.integers(1, 6)):
    found[at] = rng.integers(256)
  return bytes(found)


def replace_words(rng, content):
  """Of the header, by as many bytes, so that it stays a header."""
  words = [b"F32", b"F16", b"I64", b"U32", b"BF1", b"XXX"]
  old, new = rng.choice(len(words), size=2)
  return content.replace(words[old], words[new], int(rng.integers(1, 9)))


OF_TENSORS = (rename, move, reshape, transpose, recast, spoil, drop, describe, patterns)
OF_BYTES = (truncate, flip, replace_words)


def mutated(rng, sound, networks, path):
  """Writes a file with one or two changes at `path`."""
  tensors, metadata = sound[rng.integers(len(sound))]
  tensors, metadata = dict(tensors), dict(metadata)
  for _ in range(rng.integers(1, 3)):
    if tensors:
      OF_TENSORS[rng.integers(len(OF_TENSORS))](rng, tensors, metadata, networks)
  store(path, tensors, metadata)
  if rng.random() < 0.3:
    path.write_bytes(OF_BYTES[rng.integers(len(OF_BYTES))](rng, path.read_bytes()))


def check_applied(found, networks):
  """Every adapted layer has its place in the network, and what is added is finite."""
  for component, adapter in found.at_strength(0.5).items():
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))
    jax.eval_shape(lora.merge, networks[component], adapter)
  assert found.adapters and found.in_words()


def check_files(seed, count, networks, tmp_path):
  """Changes `count` files; AssertionError for one that is neither applied nor refused in words."""
  rng, sound = np.random.default_rng(seed), originals(networks)
  path, outcomes = tmp_path / "a.safetensors", {"applied": 0, "refused": 0}
  for number in range(count):
    mutated(rng, sound, networks, path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      try:
        check_applied(lora_files.read(path, networks), networks)
        outcomes["applied"] += 1
      except ValueError as error:
        assert 1 <= len(str(error).splitlines()) <= 3, (number, str(error))
        assert 0 < len(str(error).strip()) <= 1500, (number, str(error))
        outcomes["refused"] += 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before, number
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"], number
  assert min(outcomes.values()) > count // 20, outcomes


def test_a_changed_file_is_applied_or_refused(networks, tmp_path):
  """In the manner of the reports in LarryJane491/Lora-Training-in-Comfy#17 and the like."""
  check_files(0, FAST, networks, tmp_path)


@pytest.mark.slow
def test_two_thousand_changed_files(networks, tmp_path):
  check_files(1, COUNT - FAST, networks, tmp_path)
