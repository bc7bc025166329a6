"""A model of three numbers, `PATH`, that whole commands run on in a second: one colour a picture.

The network predicts a constant noise, its bias, so that what training changes shows at once: all
pictures get the bias's colour.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from scheduler_configs import SD1

from jaxalign import files
from jaxalign.diffusion import schedulers, transitions
from jaxalign.labels import advantages
from jaxalign.methods import Method, Rollouts
from jaxalign.modalities.image import IMAGES
from jaxalign.models.model import Model, ModelFiles

PATH = "toy_model:open_model"
SIZE = 8  # of the pictures, which are of one colour each
TABLE = 0.01  # what a letter of the prompt adds to the prediction


def open_model(**options) -> Model:
  """As configs name it; `options` are those of other families."""
  return make()


def make(**changes) -> Model:
  fields = {
    "params": {"denoiser": {"layer": {"bias": np.zeros(3, np.float32)}}},
    "tokenize": lambda records: np.array([[len(r["prompt"])] for r in records], np.float32),
    "empty": np.zeros((1, 1), np.float32),
    "condition": lambda params, tokens: {"text": TABLE * tokens},
    "denoise": denoise,
    "encode": encode,
    "decode": decode,
    "describe": lambda record: record["prompt"],
    "latent_shape": (3,),
    "sample_shape": (SIZE, SIZE, 3),
    "prediction_type": "eps",
    "levels": schedulers.training_table(SD1),
    "make_process": functools.partial(transitions.make_process, SD1),
    "modality": IMAGES,
    "files": ModelFiles(save, {}),
  }
  return Model(**{**fields, **changes})


def denoise(variables, x_t, t, cond):
  return jnp.broadcast_to(variables["params"]["layer"]["bias"] + cond["text"], x_t.shape)


def encode(params, samples, key):
  """The colour of a picture, and noise as an autoencoder has it."""
  return samples.mean((1, 2)) + jax.random.normal(key, (len(samples), 3))


def decode(params, x_0):
  colour = jax.nn.sigmoid(0.2 * x_0)  # hardly ever black or white
  return jnp.broadcast_to(colour[:, None, None], (len(x_0), SIZE, SIZE, 3))


def save(params, folder: pathlib.Path) -> None:
  bias = np.asarray(params["denoiser"]["layer"]["bias"])
  files.write_json(folder / "model.json", {"bias": bias.tolist()})


def brightness(images, records):
  return images.mean((1, 2, 3))


def make_noting(pipeline, *, advantage) -> Method:
  """A method whose loss is the sum of the bias, and which logs what it was given."""

  def loss(params, frozen, batch, key):
    bias, shape = params["params"]["layer"]["bias"], batch.fresh.shape
    values = {
      "noted/noise": jax.random.uniform(key, shape),
      "noted/fresh": batch.fresh.astype(jnp.float32),
      "noted/bias": jnp.broadcast_to(bias[0], shape),
    }
    return jnp.broadcast_to(bias.sum(), shape), values

  return Method(loss, Rollouts(advantages.of_every_sample(advantage), memory=advantage.init))
