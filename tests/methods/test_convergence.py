"""Training end to end on one dimension: the one test that would notice a wrong sign anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.diffusion import guidance, rollout, schedules, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.labels import advantages
from jaxalign.labels.base import Scores
from jaxalign.pipeline import Pipeline
from jaxalign.steering import Sampled
from jaxalign.training import batching, optim, update
from jaxalign.training.feeds import online
from jaxalign.training.state import init_state

TARGET = 1.5


def walk(params, x_t, t, cond):
  """A policy that cannot see: the same drift wherever it is."""
  return jnp.zeros_like(x_t) + params["b"]


def drift_process():
  """Five steps of x_s ~ N(x_t - b, 0.3^2): `prediction` is what is taken off."""
  table = schedules.StepTable(*[np.ones(5, np.float32)] * 6)  # the transition reads none of it

  def transition(x_t, prediction, step):
    return x_t - prediction, jnp.full((x_t.shape[0], 1), 0.3)

  return transitions.Process(table, transition)


CONVERGENCE = {  # keyword arguments and updates per rollout; the score function allows one
  "ddpo": ({"clip_range": 0.2, "kl_weight": 0.0}, 2),
  "ddpo_sf": ({"kl_weight": 0.0}, 1),
}
BATCH = 64


@functools.cache
def toy(name):
  """The compiled rollout and update of a method, its plan and its optimizer."""
  kwargs, updates = CONVERGENCE[name]
  plan = batching.solve(
    num_records=1,
    group_size=BATCH,
    microbatch=BATCH // updates,
    updates_per_epoch=updates,
    num_epochs=1,
    timestep_range=(0.0, 1.0),
    timestep_fraction=1.0,
    steps=range(5),
  )
  process = drift_process()
  tx = optim.make(
    learning_rate=0.03, max_grad_norm=1e9, weight_decay=0.0, b1=0.9, b2=0.99, epsilon=1e-8
  )
  kernel, table = Kernel(walk, process.transition), process.table
  pipeline = Pipeline(
    kernel, kernel, table, table, "eps", latent_shape=(1,), decode=lambda frozen, x_0: x_0
  )
  estimator = advantages.make("batch", limit=5.0, epsilon=1e-6)
  method = methods.make(name, pipeline, advantage=estimator, **kwargs)
  cond = guidance.Guided({}, {})

  @jax.jit
  def sample(params, key):
    key_start, key_steps = jax.random.split(key)
    x_T = 0.3 * jax.random.normal(key_start, (BATCH, 1))
    rolled = rollout.rollout(key_steps, kernel, params, table, x_T, cond, mean_over_latents)
    rewards = -jnp.square(rolled.x_0[:, 0] - TARGET)[None]
    zero = jnp.zeros(1, jnp.int32)
    valid = jnp.ones(rewards.shape, bool)
    scores = Scores(rewards, {}, {}, 0.0 * rewards, zero, zero, valid)
    _, found = method.data.label(None, scores, key)
    return online.collect([Sampled(rolled, cond, rolled.x_0)]), table, found.samples, found.values

  return (
    plan,
    tx,
    sample,
    update.jit_update(
      method, tx, lambda params, base: {**base, **params}, online.select_fn(method.data)
    ),
  )


@pytest.mark.parametrize("name", CONVERGENCE)
@pytest.mark.parametrize("seed", range(3))
def test_training_moves_the_samples_to_the_maximum_of_the_reward(name, seed):
  """x_0 = x_T - 5 b + noise, reward -(x_0 - TARGET)^2, so the optimum is b = -TARGET / 5."""
  plan, tx, sample, step_fn = toy(name)
  state = init_state({"b": jnp.zeros(1)}, tx)
  errors = []
  for step in range(40):
    data = sample(state.params, jax.random.fold_in(jax.random.key(seed), step))
    for j, selection in enumerate(batching.selections(plan, seed, step)):
      state, values = step_fn(state, {"base": {}}, data, selection, seed, step, j)
      if j == 0:
        assert (values["policy/ratio"] == 1).all()
    errors.append(abs(float(data[0][0].x_0.mean()) - TARGET))
  assert errors[0] > 1.2 and np.mean(errors[-5:]) < 0.25, errors
