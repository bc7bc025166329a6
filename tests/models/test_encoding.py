"""Texts encoded once: the same images but for bfloat16, without text encoders in the programs."""

import jax
import numpy as np
import pytest
import small_flows

from jaxalign import system
from jaxalign.models import encoding, families

KINDS = ("sd3", "z_image", "qwen_image")  # hidden states alone, with a length, and with a mask
OPTIONS = {"text_length": 20, "image_size": (8, 16)}
RECORDS = [{"prompt": prompt} for prompt in ("a cat", "dog a red", "a cat")]
SECTIONS = {"lora": system.NO_LORA, "process": {"num_steps": 2, "transition": "euler"}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
  return small_flows.write(request.param, tmp_path_factory.mktemp("model") / "model")


def sample(model):
  sys = system.from_model(model, seed=0, guidance={"scale": 2.0}, **SECTIONS)
  noise = np.random.default_rng(0).standard_normal((3, *model.latent_shape), np.float32)
  arguments = (sys.model.tokenize(RECORDS), noise, jax.random.key(0), sys.pipeline.table)
  return sys, np.asarray(jax.jit(sys.sample)(sys.policy.params, sys.frozen, *arguments).samples)


def test_images_are_the_same_but_for_rounding(folder):
  _, expected = sample(families.open_model(folder, **OPTIONS))
  sys, found = sample(families.open_model(folder, encode_once=True, **OPTIONS))
  assert set(sys.frozen) == {"base", "reference", "vae"}
  assert 0.0 < np.abs(found - expected).max() < 0.05 < np.ptp(expected)


def test_equal_texts_are_encoded_once(folder, monkeypatch):
  encoded, original = [], encoding._Encoded._encode_all

  def counted(self, rows):
    encoded.append(len(rows))
    return original(self, rows)

  monkeypatch.setattr(encoding._Encoded, "_encode_all", counted)
  model = families.open_model(folder, encode_once=True, **OPTIONS)
  first, again = model.tokenize(RECORDS), model.tokenize(RECORDS[1:])
  assert encoded == [1, 2]  # the empty text, and two
  for leaf, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(leaf[0], leaf[2])
    np.testing.assert_array_equal(leaf[1:], other)


def test_a_dry_run_has_its_shapes(folder):
  model = families.open_model(folder, encode_once=True, **OPTIONS)
  shapes = families.open_model(folder, encode_once=True, shapes_only=True, **OPTIONS)
  found, expected = shapes.tokenize(RECORDS), model.tokenize(RECORDS)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), expected
  )


def test_what_is_saved_has_its_text_encoders(folder, tmp_path):
  model = families.open_model(folder, encode_once=True, **OPTIONS)
  model.files.save(jax.tree.map(np.asarray, dict(model.params)), tmp_path / "again")
  for name in ("model.safetensors", "config.json"):
    written = tmp_path / "again" / "text_encoder" / name
    assert written.read_bytes() == (folder / "text_encoder" / name).read_bytes()
