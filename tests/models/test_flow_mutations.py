"""Folders of flow transformers changed at random: opened, or refused in a few lines, and untouched.

What is changed is as in `test_folder_mutations`. The slow part also traces what was opened, saves
it, and reads it again.
"""

import shutil
import warnings

import jax
import numpy as np
import odd_flows
import pytest
import small_flows
import test_folder_mutations

from jaxalign.models import families

COUNT, FAST = 2000, 60
LONGEST = test_folder_mutations.LONGEST


def read(model):
  """Every weight; AssertionError for one that is not finite."""
  params = jax.tree.map(np.asarray, dict(model.params))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)), "a weight is not finite"
  return params


def open_model(folder):
  return families.open_model(folder, text_length=odd_flows.LENGTH, image_size=odd_flows.SIZE)


def use(folder):
  """All that a command does with a folder before a program is compiled."""
  model = open_model(folder)
  tokens = model.tokenize([{"prompt": "a red cat"}])
  model.make_process(num_steps=2, transition="euler")
  return model, tokens, read(model)


def trace_and_save(model, tokens, params, folder):
  """What comes after: programs, and a folder that holds the same model."""
  cond = jax.eval_shape(model.condition, params, tokens)
  x_0, t = jax.ShapeDtypeStruct((1, *model.latent_shape), np.float32), np.ones(1, np.float32)
  cond |= {"guidance": t} if model.guidance["name"] == "embedded" else {}
  velocity = jax.eval_shape(model.denoise, {"params": params["denoiser"]}, x_0, t, cond)
  assert velocity.shape == x_0.shape, f"a velocity {velocity.shape} of latents {x_0.shape}"
  images = jax.eval_shape(model.decode, params, x_0)
  assert images.shape[1:] == model.sample_shape, f"images {images.shape}"
  model.files.save(params, folder)
  again = open_model(folder)
  jax.tree.map(np.testing.assert_array_equal, params, read(again))
  jax.tree.map(np.testing.assert_array_equal, tokens, again.tokenize([{"prompt": "a red cat"}]))


def misfit(folder, deep):
  """Opens a changed folder: `(whether that went well, what is wrong of how it went or did not)`."""
  before = test_folder_mutations.digests(folder)
  opened, wrong = False, ""
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
      found = use(folder)
      opened = True
      if deep:
        trace_and_save(*found, folder.parent / "saved")
    except (ValueError, OSError) as error:
      message = str(error).replace(str(folder), "F")
      if opened or not 1 <= len(message.splitlines()) <= 3 or not len(message) <= LONGEST:
        wrong = f"{'opened, then ' if opened else ''}{message}"
    except Exception as error:
      wrong = f"{'opened, then ' if opened else ''}{type(error).__name__}: {error}"
  if any(len(str(one.message)) > LONGEST for one in told):
    wrong = f"a warning of {max(len(str(one.message)) for one in told)} characters"
  if test_folder_mutations.digests(folder) != before:
    wrong = "the folder was changed"
  return opened, wrong


def outcomes(seeds, sound_flow, tmp_path, deep):
  """How many folders were opened, and by seed and kind what is wrong of others."""
  opened, failed = 0, {}
  for seed in seeds:
    rng, place = np.random.default_rng(seed), tmp_path / str(seed)  # tokenizers are kept by path
    kind = test_folder_mutations.pick(rng, list(small_flows.KINDS))
    folder = shutil.copytree(sound_flow(kind), place / "model")
    test_folder_mutations.mutate(rng, folder)
    whether, wrong = misfit(folder, deep)
    opened += whether
    if wrong:
      failed[seed, kind] = wrong[:2000]
    shutil.rmtree(place)
  return opened, failed


@pytest.mark.parametrize(
  ("seeds", "deep"),
  [(range(FAST), False), pytest.param(range(FAST, COUNT), True, marks=pytest.mark.slow)],
  ids=["fast", "slow"],
)
def test_a_changed_folder_is_opened_or_refused(seeds, deep, sound_flow, tmp_path):
  opened, failed = outcomes(seeds, sound_flow, tmp_path, deep)
  assert not failed, "\n".join(f"{where}: {wrong}" for where, wrong in failed.items())
  assert len(seeds) // 20 < opened < len(seeds) * 19 // 20
