"""Feeds that sample, on a system of a few numbers.

A sample says what it was asked: its record, and which of an iteration's samples it is, n. Rewards
are a table by n, so that every advantage can be worked out by hand.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import methods, steering
from jaxalign.diffusion import guidance, rollout, schedules
from jaxalign.distributed import sharding
from jaxalign.labels import advantages, pairs
from jaxalign.modalities.modality import Modality, SampleError
from jaxalign.rewards import combine, contract
from jaxalign.training.state import TrainState

SEED, MICROBATCH, NUM_STEPS = 3, 4, 3
REWARDS = np.array([0, 4, 1, 3, 5, 5, 2, 8], np.float32)  # of the samples of an iteration
# Step s has t = s.
TABLE = schedules.StepTable(
  *[np.arange(NUM_STEPS, dtype=np.float32)] * 5, noise_scale=np.ones(NUM_STEPS, np.float32)
)
# Two updates of four samples, each on both of the steps that have noise, in two slices.
BATCH = {
  "num_records": 4,
  "group_size": 2,
  "microbatch": MICROBATCH,
  "updates_per_epoch": 2,
  "num_epochs": 1,
  "timestep_range": (0.0, 1.0),
  "timestep_fraction": 1.0,
}
LEAVE_ONE_OUT = advantages.make("leave_one_out", limit=100.0)


def by_advantage(estimator=LEAVE_ONE_OUT, **changes):
  label = advantages.of_every_sample(estimator)
  return methods.Rollouts(label, memory=estimator.init)._replace(**changes)


PAIRS_OF_STEPS = methods.Rollouts(pairs.best_and_worst, shared_noise=True)


class Stub:
  """A `System` whose trajectories are numbers: `x[s]` of sample n is 100 n + s."""

  def __init__(self):
    self.noise, self.starts, self.sampled_with, self.scales = [], [], [], []
    self.mesh, self.frozen = sharding.one_device(), {}
    # Only steps whose noise is scaled to something have any, and the second is never one.
    self.process = types.SimpleNamespace(transition=self.transition)
    self.pipeline = types.SimpleNamespace(table=TABLE)
    self.unfit = None  # the sample n that no reward may see
    modality = Modality("numbers", self.check, {}, None, self.write)
    self.model = types.SimpleNamespace(modality=modality)
    self.sampler = steering.Sampler(None, keeps_trajectory=True, name="stub")

  @staticmethod
  def transition(x_t, prediction, row):
    return x_t, np.where(row.t == 1, 0.0, row.noise_scale)[:, None]

  @staticmethod
  def tokenize(records):
    return np.array([[record["value"]] for record in records], np.float32)

  def sample_fn(self, params, frozen, tokens, seed, name, i, j, start, table):
    self.noise.append((seed, name, i, j))
    self.starts.append(start)
    self.sampled_with.append(params)
    self.scales.append(table.noise_scale)
    n = MICROBATCH * j + jnp.arange(float(len(tokens)))
    steps = jnp.append(table.t, NUM_STEPS)[:, None]
    rolled = rollout.Rollout(x=(100 * n + steps)[..., None], log_prob=-(10 * n + steps[:-1]))
    cond = guidance.Guided({"text": jnp.asarray(tokens)}, {"text": jnp.zeros((1, 1))})
    samples = jnp.stack([tokens[:, 0], n], axis=1)
    samples = jax.device_put(samples, sharding.batch(self.mesh))
    keeps = self.sampler.keeps_trajectory
    return steering.Sampled(rolled if keeps else None, cond, samples, x_0=rolled.x_0)

  @staticmethod
  def kl_fn(params, frozen, sampled, table):
    assert table.t.tolist() == TABLE.t.tolist()
    return 1.0 + sampled.samples[:, 1] % 2  # 1 nat of every even sample, 2 of every odd one

  def check(self, samples):
    if self.unfit in samples[:, 1]:
      raise SampleError("it is unfit", index=int(np.argmax(samples[:, 1] == self.unfit)))

  @staticmethod
  def write(samples, folder):
    np.save(folder / "0000.npy", samples)
    return [folder / "0000.npy"]


def by_number(samples, records):
  """The table's reward, of a sample that comes with its own record."""
  assert [record["value"] for record in records] == samples[:, 0].tolist()
  return REWARDS[samples[:, 1].astype(int)]


def record_value(samples, records):
  return np.array([record["value"] for record in records], np.float32)


def rewards_of(*functions, weights=(1.0,), normalize="none"):
  made = tuple(contract.Reward(function.__name__, function) for function in functions)
  return combine.WeightedRewards(made, weights, normalize)


BY_NUMBER = rewards_of(by_number)


def state_of(feed, params=None, **copies):
  return TrainState(
    jnp.zeros((), jnp.int32), params or {}, None, {}, {}, copies, feed.init_memory()
  )


def starts(stub):
  """Of every microbatch: which noise its samples start from."""
  return [None if start is None else start.tolist() for start in stub.starts]


def draw(feed, step=0):
  return feed.draw(state_of(feed), step)


def every(feed, drawn):
  """The batches of all slices of all updates, as one of numpy arrays."""
  parts = []
  for selection in drawn.selections:
    for k in range(len(selection.example)):
      one = jax.tree.map(lambda leaf, k=k: leaf[k], selection)
      batch = feed.select(drawn.data, one)
      cond = batch.cond.cond if isinstance(batch, methods.Steps) else batch.cond
      parts.append(dataclasses.replace(batch, cond=cond["text"]))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


PAIRS = {"num_records": 4, "group_size": 2, "updates_per_epoch": 1}


FINISHED = {"timestep_range": None, "timestep_fraction": None}  # fields that a batch has not
