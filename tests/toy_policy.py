"""A policy small enough to see through, and a batch of each kind that methods learn from.

It denoises `SHAPE` latents with prediction `w * x_t + b + cond`, so rollout, selection, loss and
update are the real ones and only the network is small.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import shipped
from scheduler_configs import SD1

from jaxalign import methods
from jaxalign.diffusion import guidance, rollout, schedulers, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.labels import advantages
from jaxalign.labels.base import Scores
from jaxalign.pipeline import Pipeline
from jaxalign.steering import Sampled
from jaxalign.training import batching
from jaxalign.training.feeds import online

SHAPE = (3, 5, 2)
NUM_STEPS = 4
PROCESS = transitions.make_process(SD1, num_steps=NUM_STEPS, transition="ddim", eta=1.0)
PARAMS = {"w": jnp.float32(0.9), "b": jnp.array([0.05, -0.1])}
REFERENCE = {"w": jnp.float32(0.85), "b": jnp.array([0.02, -0.03])}
OLD = {"w": jnp.float32(0.87), "b": jnp.array([0.04, -0.06])}  # a copy of the policy
FROZEN = {
  "base": {}, "reference": REFERENCE, "old": OLD, "rewards": {"scale": jnp.float32(2.0)}
}
NUM_IMAGES = 6
ADVANTAGES = jnp.array([1.0, -0.5, 0.25, -2.0, 0.75, 1.5])


def denoise(params, x_t, t, cond):
  assert t.shape == x_t.shape[:1]
  return params["w"] * x_t + params["b"] + cond["text"][:, None, None]


GUIDED = guidance.classifier_free(denoise, 1.5)


def reward(frozen, samples, query):
  """Smooth and concave: the samples' distance from the prompt's number."""
  distance = samples - query[:, None, None, None]
  return -frozen["rewards"]["scale"] * jnp.mean(jnp.square(distance), axis=(1, 2, 3))


TABLE = PROCESS.table
KERNEL = Kernel(GUIDED, PROCESS.transition)
PIPELINE = Pipeline(
  kernel=KERNEL,
  conditional=Kernel(denoise, PROCESS.transition),
  table=TABLE,
  levels=schedulers.training_table(SD1),
  prediction_type="eps",
  latent_shape=SHAPE,
  decode=lambda frozen, x_0: 0.5 * x_0 + 0.5,
  reward=reward,
)


@functools.cache
def trajectories():
  """Two stacked microbatches of three images, sampled with PARAMS."""

  @shipped.jit
  def sample(key, cond):
    key_start, key_steps = jax.random.split(key)
    x_T = jax.random.normal(key_start, (3, *SHAPE))
    return rollout.rollout(key_steps, KERNEL, PARAMS, TABLE, x_T, cond, mean_over_latents)

  parts = []
  for j in range(2):
    text = 0.1 * jax.random.normal(jax.random.key(j), (3, 2))
    cond = guidance.Guided({"text": text}, {"text": jnp.zeros((1, 2))})
    rolled = sample(jax.random.key(7 + j), cond)
    parts.append(Sampled(rolled, cond, rolled.x_0))
  return online.collect(parts)


def one_batch():
  """The same as one batch of six images."""
  rolled, cond = trajectories()
  rolled = jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1, *leaf.shape[3:]), rolled)
  text = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cond.cond)
  return rolled, cond._replace(cond=text)


def selection(example, i, fresh=False):
  example = np.array(example, np.int32)
  return batching.Selection(example, np.array(i, np.int32), np.full(example.shape, fresh))


EVERY_SAMPLE = np.arange(NUM_IMAGES, dtype=np.int32)
ADVANTAGE = advantages.make("batch", epsilon=1e-6, limit=5.0)
select_steps = jax.jit(online.select_fn(methods.Rollouts(None, by="step")))
TEXT = jnp.array([[0.1, -0.2], [0.05, 0.0], [-0.1, 0.3]])


def transitions_of(advantages=ADVANTAGES):
  """What a feed of DDPO holds: every sample is an example, with its advantage."""
  return trajectories(), TABLE, EVERY_SAMPLE, {"advantages": advantages}


def transitions_batch():
  return select_steps(transitions_of(), selection([5, 0, 3, 2, 2], [0, 3, 1, 2, 0]))


def step_pairs_batch():
  images = np.array([[5, 0], [1, 4], [2, 3]], np.int32)
  weight = np.array([1.5, 0.0, 0.75], np.float32)
  data = (trajectories(), TABLE, images, {"weight": weight})
  return select_steps(data, selection([2, 0, 0], [1, 3, 2]))


def pairs_batch():
  x_0 = jax.random.normal(jax.random.key(5), (3, 2, *SHAPE))
  return methods.Finished(x_0, {"text": TEXT}, {"p": jnp.array([1.0, 0.5, 0.8])})


def inputs_batch():
  cond = guidance.Guided({"text": TEXT}, {"text": jnp.zeros((1, 2))})
  return methods.Inputs(cond, jnp.array([0.4, 0.6, 0.5]))


def finished_batch(**labels):
  """Three samples by themselves."""
  x_0 = jax.random.normal(jax.random.key(6), (3, *SHAPE))
  return methods.Finished(x_0, {"text": TEXT}, {k: jnp.array(v) for k, v in labels.items()})


def online_pairs_batch():
  batch = pairs_batch()
  return dataclasses.replace(batch, labels={**batch.labels, "weight": jnp.array([1.5, 1.5, 0.0])})


# A batch of what each method learns from.
BATCHES = {
  **dict.fromkeys(("ddpo", "ddpo_sf", "mix_grpo"), transitions_batch),
  "d3po": step_pairs_batch,
  **dict.fromkeys(("dpo", "ipo"), pairs_batch),
  **dict.fromkeys(("draft", "draft_lv", "align_prop", "refl"), inputs_batch),
  "kto": functools.partial(finished_batch, good=[1.0, 0.0, 1.0]),
  "online_dpo": online_pairs_batch,
  "nft": functools.partial(finished_batch, advantages=[1.0, -0.5, 2.0]),
  "raft": functools.partial(finished_batch, weight=[1.5, 1.5, 0.0]),
  **dict.fromkeys(("rwr", "rwr_sparse"), functools.partial(finished_batch, weight=[0.5, 2.0, 0.5])),
}


def scores_of(total, record=None, **named):
  """`Scores` of rewards `[P, K]`, not valid where one is NaN.

  Of records 0 to P - 1, and of one reward, unless told.
  """
  total = np.asarray(total, np.float32)
  record = np.arange(len(total), dtype=np.int32) if record is None else np.array(record, np.int32)
  named = {name: np.asarray(values, np.float32) for name, values in named.items()}
  named = named or {"reward": total}
  weights = {name: np.float32(1.0) for name in named}
  group = np.unique(record, return_inverse=True)[1].astype(np.int32)
  valid = ~np.isnan(total)
  return Scores(total, named, weights, np.zeros_like(total), record, group, valid)
