"""A policy small enough to see through, and a batch of each kind that methods learn from.

It denoises `SHAPE` latents with prediction `w * x_t + b + cond`, so rollout, selection, loss and
update are the real ones and only the network is small.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scheduler_configs import SD1

from jaxalign import methods
from jaxalign.diffusion import guidance, rollout, schedulers, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.pipeline import Pipeline
from jaxalign.training import batching
from jaxalign.training.feeds import rollouts

SHAPE = (3, 5, 2)
NUM_STEPS = 4
PROCESS = transitions.make_process(SD1, num_steps=NUM_STEPS, transition="ddim", eta=1.0)
PARAMS = {"w": jnp.float32(0.9), "b": jnp.array([0.05, -0.1])}
REFERENCE = {"w": jnp.float32(0.85), "b": jnp.array([0.02, -0.03])}
FROZEN = {"base": {}, "reference": REFERENCE, "reward": {"scale": jnp.float32(2.0)}}
NUM_IMAGES = 6
ADVANTAGES = jnp.array([1.0, -0.5, 0.25, -2.0, 0.75, 1.5])


def denoise(params, x_t, t, cond):
  assert t.shape == x_t.shape[:1]
  return params["w"] * x_t + params["b"] + cond["text"][:, None, None]


GUIDED = guidance.classifier_free(denoise, 1.5)


def reward(frozen, samples, query):
  """Smooth and concave: the samples' distance from the prompt's number."""
  distance = samples - query[:, None, None, None]
  return -frozen["reward"]["scale"] * jnp.mean(jnp.square(distance), axis=(1, 2, 3))


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

  @jax.jit
  def sample(key, cond):
    key_start, key_steps = jax.random.split(key)
    x_T = jax.random.normal(key_start, (3, *SHAPE))
    return rollout.rollout(key_steps, KERNEL, PARAMS, TABLE, x_T, cond, mean_over_latents)

  parts = []
  for j in range(2):
    text = 0.1 * jax.random.normal(jax.random.key(j), (3, 2))
    cond = guidance.Guided({"text": text}, {"text": jnp.zeros((1, 2))})
    parts.append((sample(jax.random.key(7 + j), cond), cond))
  return rollouts.collect(parts)


def one_batch():
  """The same as one batch of six images."""
  rolled, cond = trajectories()
  rolled = jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1, *leaf.shape[3:]), rolled)
  text = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), cond.cond)
  return rolled, cond._replace(cond=text)


def selection(example, i, fresh=False):
  example = np.array(example, np.int32)
  return batching.Selection(example, np.array(i, np.int32), np.full(example.shape, fresh))


select_transitions = jax.jit(rollouts.Rollouts.select)
select_step_pairs = jax.jit(rollouts.RolloutPairs.select)


def make_batch(data):
  """A batch of what `methods.Method.data` names."""
  text = jnp.array([[0.1, -0.2], [0.05, 0.0], [-0.1, 0.3]])
  if data == "rollout":
    return select_transitions(
      (trajectories(), TABLE, ADVANTAGES), selection([5, 0, 3, 2, 2], [0, 3, 1, 2, 0])
    )
  if data == "rollout_pairs":
    images = np.array([[5, 0], [1, 4], [2, 3]], np.int32)
    weight = np.array([1.5, 0.0, 0.75], np.float32)
    data = (trajectories(), TABLE, images, weight)
    return select_step_pairs(data, selection([2, 0, 0], [1, 3, 2]))
  if data == "pairs":
    x_0 = jax.random.normal(jax.random.key(5), (3, 2, *SHAPE))
    return methods.Pairs(x_0, {"text": text}, jnp.array([1.0, 0.5, 0.8]))
  if data == "records":
    cond = guidance.Guided({"text": text}, {"text": jnp.zeros((1, 2))})
    return methods.Records(cond, jnp.array([0.4, 0.6, 0.5]))
  raise ValueError(f"no batch of {data!r}: add one")
