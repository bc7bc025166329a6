"""Folders of random flow transformers to be changed, and what may become of them."""

import contextlib
import functools
import re
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_flows

from jaxalign import files
from jaxalign.models import families
from jaxalign.models.families import flux2

LENGTH, SIZE = 8, (16, 16)
# FLUX.2's language model is read at layers 9, 18 and 27, which take seconds to trace.
SHALLOW = dict.fromkeys(("qwen3", "mistral"), (1, 2, 3))
DEPTH = {"text_encoder": {"num_hidden_layers": 4}}
PROMPT = [{"prompt": "a red cat"}]
WEIGHTS = {
  "transformer": "diffusion_pytorch_model",
  "vae": "diffusion_pytorch_model",
  "text_encoder": "model",
  "text_encoder_2": "model",
}


@contextlib.contextmanager
def written(tmp_path_factory):
  """`write(kind)`: the folder of a random model of a kind, written once; FLUX.2 is read early."""

  @functools.cache
  def write(kind):
    changes = DEPTH if kind == "flux2" else {}
    return small_flows.write(kind, tmp_path_factory.mktemp(kind) / "model", LENGTH, **changes)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flux2, "_DEPTHS", SHALLOW)
    yield write


def open_model(folder, **options):
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*assumed or corrected")
    return families.open_model(folder, **{"text_length": LENGTH, "image_size": SIZE, **options})


def read(model):
  return jax.tree.map(np.asarray, dict(model.params))


def refusal(function, *arguments, **options):
  """What a user is told: an error of at most three lines and 1500 characters."""
  with pytest.raises((ValueError, OSError)) as error:
    function(*arguments, **options)
  message = str(error.value)
  assert 1 <= len(message.splitlines()) <= 3 and len(message) <= 1500, message
  return message


def check_refused(words, folder, **options):
  """It is, in these words, and with the name of the folder."""
  message = refusal(open_model, folder, **options)
  assert re.search(words, message, re.DOTALL), message
  assert str(folder) in message, message


def check_same(folder, other):
  """Two folders hold the same weights, and read prompts alike."""
  one, two = open_model(folder), open_model(other)
  jax.tree.map(np.testing.assert_array_equal, read(one), read(two))
  jax.tree.map(np.testing.assert_array_equal, one.tokenize(PROMPT), two.tokenize(PROMPT))
  assert text_of(one) == text_of(two)
  return one


def text_of(model):
  return model.denoise.__self__.text


def change(file, **fields):
  files.write_json(file, {**files.read_json(file), **fields})


def change_text_config(folder, **fields):
  """Of a language model, wherever its fields are."""
  file = folder / "text_encoder" / "config.json"
  config = files.read_json(file)
  config.get("text_config", config).update(fields)
  files.write_json(file, config)


def drop(file, *names):
  files.write_json(file, {k: v for k, v in files.read_json(file).items() if k not in names})


def tensors_of(folder, component):
  file = folder / component / f"{WEIGHTS[component]}.safetensors"
  return file, dict(safetensors.numpy.load_file(file))


def store(tensors, file):
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def rename(folder, component, new_name):
  """Tensors under other names; those of which `new_name` makes None are left out."""
  file, tensors = tensors_of(folder, component)
  named = {new_name(name): tensor for name, tensor in tensors.items()}
  store({name: tensor for name, tensor in named.items() if name is not None}, file)
