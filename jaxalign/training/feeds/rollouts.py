"""Trajectories sampled by the policy and scored on the host: what policy gradients learn from."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, methods, streams, system
from jaxalign.data import records as records_lib
from jaxalign.diffusion import guidance
from jaxalign.diffusion.rollout import Rollout
from jaxalign.distributed import sharding
from jaxalign.labels import advantages
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import RewardError
from jaxalign.rewards.pool import Exchange, RewardPool
from jaxalign.training import batching
from jaxalign.training.feeds import base, exactness
from jaxalign.training.feeds.base import Drawn, Program, averages, stack
from jaxalign.training.state import TrainState
from jaxalign.types import Array, Params

# Of all samples of an iteration, and their conditioning, as stacked microbatches: leaves of the
# rollout are [S + 1 or S, J, m, ...] and those of the conditioning [J, m, ...], cut along m.
Trajectories = tuple[Rollout, Any]


class Sampling:
  """Records in, scored trajectories out: the half of an iteration that methods share.

  One microbatch is scored on the host while the device samples the next, by the process whose
  devices hold the samples; then every process learns all rewards.
  """

  frozen: Mapping[str, Params] = {}

  def __init__(
    self,
    sections: Mapping[str, Any],
    sys: system.System,
    method: methods.Method,
    rewards: WeightedRewards | None,
    workdir: pathlib.Path,
    *,
    plan: batching.BatchPlan,
    shared_noise: bool,
  ):
    if rewards is None:
      raise ValueError("config.reward is missing; a method that samples needs one")
    section = functools.partial(checks.call_section, sections)
    self.plan = plan
    self.num_samples, self.microbatch = plan.samples, plan.microbatch
    self.unit = sys.model.modality.unit
    self.records = section("data", records_lib.load)
    check = sys.model.modality.check
    self.pool = section("reward_pool", RewardPool, total=rewards, check=check)
    self._rewards = rewards
    self.tokens = base.tokenize(sys.model, self.records.records)
    self._sys, self._seed, self._workdir = sys, sections["seed"], workdir
    self._exactness = section("exactness", exactness.make)
    self._kl_weight = method.kl_weight
    self._table = sys.pipeline.table
    self._group = plan.group_size if shared_noise else None
    self._start = self._starts(plan.microbatch)
    self._collect_fn = jax.jit(collect, out_shardings=collected_shardings(sys.mesh))

  def describe(self) -> str:
    return self.plan.describe(self.unit)

  def sample(
    self, state: TrainState, step: int
  ) -> tuple[Trajectories, np.ndarray, np.ndarray, dict[str, float]]:
    """`(trajectories, record ids [B], rewards [B], metrics)` of one iteration."""
    plan, sys = self.plan, self._sys
    # A group of K samples for each of P records, in one row: a record's samples are neighbours.
    chosen = self.records.draw_for_step(self._seed, step, plan.num_records)  # [P]
    record_ids = np.repeat(chosen, plan.group_size)
    parts, pending, kl = [], [], []
    for j, ids in enumerate(np.split(record_ids, plan.microbatches)):
      noise = (self._seed, streams.number("rollout"), step, j, self._start, self._table)
      sampled = sys.sample_fn(state.params, sys.frozen, system.take(self.tokens, ids), *noise)
      parts.append((sampled.rollout, sampled.cond))
      # Scored by threads of the host that holds them, while the device samples the next ones.
      rows, held = sharding.held_rows(sampled.samples)
      pending.append(self.pool.submit(held, self.records[ids[rows]]))
      if self._kl_weight:
        kl.append(sys.kl_fn(state.params, sys.frozen, sampled, self._table))
    trajectories = self._collect_fn(parts)

    # Every host learns all rewards, as groups and statistics go over hosts.
    def exchange(named):
      held = np.stack(list(named.values())).reshape(len(named), plan.microbatches, -1)
      whole = sharding.exchange(held, rows, plan.microbatch, sys.mesh)
      return dict(zip(named, whole.reshape(len(named), -1), strict=True))

    total, named = self._gather(pending, exchange, step)
    raw = self._rewards.raw(named)  # [P K], as a log shows them: before any normalisation
    record = {"reward/mean": float(raw.mean()), "reward/std": float(raw.std())}
    record |= {f"reward/{name}": float(values.mean()) for name, values in named.items()}
    if plan.group_size > 1:
      spread = np.ptp(raw.reshape(-1, plan.group_size), axis=1)
      record["reward/flat_groups"] = float(np.mean(spread == 0))  # these teach nothing
    if kl:  # a penalty is taken off the reward before advantages are estimated
      nats = np.concatenate(jax.device_get(kl))
      record["kl/to_ref"] = float(nats.mean())
      total = total - self._kl_weight * nats
    return trajectories, record_ids, total, record

  def _gather(
    self, pending: Sequence[futures.Future], exchange: Exchange, step: int
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`RewardPool.gather`, saving the sample that cannot be used before its error goes on."""
    try:
      return self.pool.gather(pending, exchange)
    except RewardError as error:
      if error.sample is None:
        raise
      rejected = self._workdir / f"rejected_step_{step:06d}"
      rejected.mkdir(exist_ok=True)
      (path,) = self._sys.model.modality.write(np.nan_to_num(error.sample)[None], rejected)
      raise RewardError(f"iteration {step}: {error}\nits sample is in {path}") from error

  def _starts(self, microbatch: int) -> np.ndarray | None:
    """Which noise each of a microbatch starts from: its group's first, if they share it."""
    samples = np.arange(microbatch, dtype=np.int32)
    return samples // self._group * self._group if self._group else None

  def program(self, state: TrainState, microbatch: int) -> Program:
    rows = np.resize(np.arange(len(self.records)), microbatch)
    noise = (self._seed, streams.number("rollout"), 0, 0, self._starts(microbatch), self._table)
    args = (state.params, self._sys.frozen, system.take(self.tokens, rows), *noise)
    return Program("rollout", self._sys.sample_fn, args)

  def trajectory_shapes(self, state: TrainState) -> Trajectories:
    """Those of an iteration, as shapes where they will lie."""
    # Traced, not run: a dry run for devices that are not there has nothing to run on.
    _, function, args = self.program(state, self.microbatch)
    sampled = jax.eval_shape(function, *args)
    parts = [(sampled.rollout, sampled.cond)] * self.plan.microbatches
    return sharding.shaped(jax.eval_shape(collect, parts), collected_shardings(self._sys.mesh))

  def check(self, record: Mapping[str, float], step: int) -> str | None:
    if exactness.GAP not in record:
      return None
    transitions = self.plan.slices * self.plan.slice_size
    return self._exactness.problem(record, step, transitions)

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    self.pool.close()


class Rollouts(Sampling):
  """Single transitions with the advantage of their trajectory (`methods.Transitions`)."""

  def __init__(self, sections, sys, method, rewards, workdir):
    plan = checks.call_section(
      sections,
      "batch",
      batching.solve,
      steps=sys.process.stochastic_steps(),
      devices=sys.mesh.size,
    )
    if method.on_policy and plan.updates > 1:
      raise ValueError(
        f"config.method: it has no ratio to correct a second update, and the batch asks for "
        f"{plan.updates}\nset config.batch.updates_per_epoch and num_epochs to 1"
      )
    super().__init__(sections, sys, method, rewards, workdir, plan=plan, shared_noise=False)
    self._estimator = checks.call_section(
      sections,
      "advantage",
      advantages.make,
      num_groups=plan.num_records,
      group_size=plan.group_size,
    )
    placed = (sharding.params(self.init_stats(), sys.mesh), sharding.replicated(sys.mesh))
    self._estimate_fn = jax.jit(self._estimator.estimate, out_shardings=placed)

  def init_stats(self):
    return self._estimator.init(len(self.records))

  def draw(self, state: TrainState, step: int) -> Drawn:
    trajectories, record_ids, total, record = self.sample(state, step)
    # Numbers of the groups in this batch; `record_ids` are those of the whole run.
    group = np.unique(record_ids, return_inverse=True)[1].astype(np.int32)
    stats, advantage = self._estimate_fn(state.stats, total, record_ids, group)
    state = dataclasses.replace(state, stats=stats)
    selections = batching.selections(self.plan, self._seed, step)
    return Drawn(state, (trajectories, self._table, advantage), selections, record)

  def shapes(self, state: TrainState) -> tuple[Any, batching.Selection]:
    advantage = np.zeros(self.plan.samples, np.float32)
    selection = batching.selections(self.plan, self._seed, 0)[0]
    return (self.trajectory_shapes(state), self._table, advantage), selection

  @staticmethod
  def select(data, selected: batching.Selection) -> methods.Transitions:
    (rollout, cond), table, advantages = data
    sample, i, fresh = selected
    # [b]: each transition from the device that sampled it.
    (x_t, x_s, old_log_prob), own = pick_steps(rollout, cond.cond, sample, i)
    return methods.Transitions(
      x_t=x_t,
      x_s=x_s,
      row=table[jnp.asarray(i)],
      cond=cond._replace(cond=own),
      old_log_prob=old_log_prob,
      fresh=jnp.asarray(fresh),
      advantages=advantages[sample],
    )

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The gap is of the first update alone, where the parameters are still those that sampled."""
    record = averages(updates)
    if "policy/ratio" in record:
      record["policy/ratio_mean"] = record.pop("policy/ratio")
      record["policy/first_ratio_max_error"] = float(np.abs(updates[0]["policy/ratio"] - 1).max())
      record |= self._exactness.metrics(updates[0][exactness.GAP])
    return record


class RolloutPairs(Sampling):
  """The best and the worst trajectory of each record, all from one noise (`methods.StepPairs`).

  Records whose samples all earn the same have no better one: they count 0, and the others as much
  more, so that the mean over the batch is the mean over pairs.
  """

  def __init__(self, sections, sys, method, rewards, workdir):
    plan = checks.call_section(
      sections,
      "batch",
      batching.solve,
      steps=sys.process.stochastic_steps(),
      devices=sys.mesh.size,
      pairs=True,
    )
    sharding.check_batch("config.batch.microbatch / 2, the pairs", plan.slice_size, sys.mesh)
    super().__init__(sections, sys, method, rewards, workdir, plan=plan, shared_noise=True)

  def init_stats(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    trajectories, _, total, record = self.sample(state, step)
    chosen, weight = best_and_worst(total.reshape(-1, self.plan.group_size))
    record["preference/ties"] = float(np.mean(weight == 0))
    selections = batching.selections(self.plan, self._seed, step)
    return Drawn(state, (trajectories, self._table, chosen, weight), selections, record)

  def shapes(self, state: TrainState) -> tuple[Any, batching.Selection]:
    chosen, weight = best_and_worst(np.zeros((self.plan.num_records, self.plan.group_size)))
    selection = batching.selections(self.plan, self._seed, 0)[0]
    return (self.trajectory_shapes(state), self._table, chosen, weight), selection

  @staticmethod
  def select(data, selected: batching.Selection) -> methods.StepPairs:
    (rollout, cond), table, chosen, weight = data
    pair, i, _ = selected
    # [b, 2]: the same step of the two of a pair, which have one condition.
    (x_t, x_s, _), both = pick_steps(rollout, cond.cond, jnp.asarray(chosen)[pair], i[:, None])
    return methods.StepPairs(
      x_t=x_t,
      x_s=x_s,
      row=table[jnp.asarray(i)],
      cond=cond._replace(cond=jax.tree.map(lambda leaf: leaf[:, 0], both)),
      weight=jnp.asarray(weight)[pair],
    )

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    return averages(updates)


def best_and_worst(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """From rewards `[P, K]`: samples `[P, 2]` int32, the best first, and weights `[P]` float32.

  Among several best (or worst) it takes the first. A weight is 0 where all K are equal, and else
  P divided by the number of records where they are not.
  """
  P, K = rewards.shape
  samples = np.stack([rewards.argmax(axis=1), rewards.argmin(axis=1)], axis=1)
  samples = (samples + K * np.arange(P)[:, None]).astype(np.int32)
  # The mean over the batch is then the mean over pairs that have a better one.
  untied = rewards.max(axis=1) > rewards.min(axis=1)
  return samples, (untied * (P / max(1, untied.sum()))).astype(np.float32)


def pick_steps(rollout: Rollout, cond: Any, sample: Array, i: Array) -> tuple[Any, Any]:
  """`((x_t, x_s, log_prob), cond)` of steps `i` of samples, each from the device that sampled it.

  `sample` is `[b]` or `[b, 2]`, and `i` goes with it; so do the leading axes of what is returned.
  """

  def pick(stacked, place, i):
    (rollout, cond), (j, row) = stacked, place
    steps = rollout.x[i, j, row], rollout.x[i + 1, j, row], rollout.log_prob[i, j, row]
    return steps, jax.tree.map(lambda leaf: leaf[j, row], cond)

  return sharding.pick_own_rows(pick, (rollout, cond), (2, 1), sample, i)


def collect(parts: list[Trajectories]) -> Trajectories:
  """Stacks the microbatches of an iteration; each device keeps what it has sampled."""
  rollouts, conds = zip(*parts, strict=True)
  # Steps stay in front; microbatches become an axis of their own, so that nothing crosses devices.
  rollout = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *rollouts)
  # The empty condition is the same in all of them.
  return rollout, conds[0]._replace(cond=stack([cond.cond for cond in conds]))


def collected_shardings(mesh: jax.sharding.Mesh) -> Any:
  """Where `collect` leaves trajectories, in the shape of a prefix of them."""
  cond = guidance.Guided(sharding.batch(mesh, axis=1), sharding.replicated(mesh))
  return sharding.batch(mesh, axis=2), cond
