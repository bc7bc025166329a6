"""Samples of the policy, scored and labelled: what online methods learn from."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, streams, system
from jaxalign.data import records as records_lib
from jaxalign.diffusion import guidance
from jaxalign.diffusion.rollout import Rollout
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Process
from jaxalign.distributed import sharding
from jaxalign.labels.base import Labels, Scores
from jaxalign.methods import Rollouts
from jaxalign.methods.batches import Finished, Steps
from jaxalign.rewards import scoring
from jaxalign.steering import Sampled
from jaxalign.training import batching
from jaxalign.training.feeds import base, exactness, scored
from jaxalign.training.feeds.base import Drawn, Program, SelectFn, averages, stack
from jaxalign.training.setup import Setup
from jaxalign.training.state import TrainState
from jaxalign.types import Array, Params

# Of all samples of an iteration, and their conditioning, as stacked microbatches: leaves of the
# rollout are [S + 1 or S, J, m, ...] and those of the conditioning [J, m, ...], cut along m.
Trajectories = tuple[Rollout, Any]
KINDS = ("step", "sample")  # what `Rollouts.by` may be


class Online:
  """Records in, sampled and labelled examples out (`methods.Rollouts`).

  A microbatch is scored as soon as it is sampled: where it lies, on the mesh, or on the host while
  the devices sample the next one (`rewards.scoring`). Scores are fetched when all are under way.
  """

  def __init__(self, setup: Setup, data: Rollouts, workdir: str | os.PathLike):
    workdir = pathlib.Path(workdir)
    if setup.rewards is None:
      raise ValueError("config.reward is missing; a method that samples needs one")
    checks.check_choice("config.method: Rollouts.by", data.by, KINDS)
    checks.check_choice("config.method: sampled_by", data.sampled_by, ("policy", *setup.copies))
    self._data, self._sys, self._rewards = data, setup.system, setup.rewards
    self._check_sampler()
    section = functools.partial(checks.call_section, setup.sections)
    self._seed, self._workdir = setup.sections["seed"], workdir
    self.records = section("data", records_lib.load)
    self.tokens = base.tokenize(self._sys.tokenize, self.records.records)
    self.plan = section(
      "batch",
      batching.solve,
      steps=self._noisy_steps(0) if data.by == "step" else None,
      count_examples=self._count_examples,
      devices=self._sys.mesh.size,
    )
    if data.on_policy and self.plan.updates > 1:
      raise ValueError(
        f"config.method: it has no ratio to correct a second update, and the batch asks for "
        f"{self.plan.updates}\nset config.batch.updates_per_epoch and num_epochs to 1"
      )
    self.num_samples, self.microbatch = self.plan.samples, self.plan.microbatch
    self.unit = self._sys.model.modality.unit
    kind = {"step": "transition", "sample": "sample"}[data.by]
    self.example = kind if self.plan.width == 1 else f"{kind}, {self.plan.width} at once"
    self._timestep_range = setup.sections["batch"].get("timestep_range")
    on_mesh = scoring.OnMesh(setup.rewards, self._sys.model.modality, self._sys.mesh)
    query = base.tokenize(setup.rewards.encode, self.records.records)
    self.scorer = section(
      "reward_pool",
      scoring.Scorer,
      total=setup.rewards,
      on_mesh=on_mesh,
      records=self.records,
      query=query,
    )
    self._exactness = section("exactness", exactness.make) if data.by == "step" else None
    self.select = select_fn(data)
    mesh = self._sys.mesh
    self._collect_fn = jax.jit(
      collect if data.by == "step" else collect_finished,
      out_shardings=collected_shardings(data.by, mesh),
    )
    # Labels are a few numbers a sample, and whole on every device.
    placed = (sharding.params(self.init_memory(), mesh), sharding.replicated(mesh))
    self._label_fn = jax.jit(data.label, out_shardings=placed)
    self._start = self._starts(self.microbatch)

  def _check_sampler(self) -> None:
    """Raises ValueError where trajectories are wanted, and the sampler has none."""
    sampler, data = self._sys.sampler, self._data
    if not sampler.keeps_trajectory and (data.by == "step" or data.kl_weight):
      raise ValueError(
        "config.sampler: expected the chain, because config.method learns from trajectories, which "
        f'"{sampler.name}" does not keep\nor take a method on finished samples, such as "rwr"'
      )

  def describe(self) -> str:
    return self.plan.describe(self.unit)

  def init_memory(self) -> Any:
    return self._data.memory(len(self.records))

  def draw(self, state: TrainState, step: int) -> Drawn:
    plan, table = self.plan, self._table(step)
    # A group of K samples for each of P records, in one row: a record's samples are neighbours.
    chosen = self.records.draw_for_step(self._seed, step, plan.num_records)  # [P]
    collected, scores, record = self._sample(state, step, chosen, table)
    key = streams.stream(self._seed, "labels", step)
    # The memory comes back in the state, whose checkpoint a restart goes on from.
    memory, labels = self._label_fn(state.memory, scores, key)
    record |= {name: float(value) for name, value in labels.metrics.items()}
    selections = batching.selections(plan, self._seed, step, self._trained_steps(step))
    if self._data.sampled_by != "policy":  # whose ratio to the policy is not 1 by construction
      selections = [one._replace(fresh=np.zeros_like(one.fresh)) for one in selections]
    state = dataclasses.replace(state, memory=memory)
    return Drawn(state, (collected, table, labels.samples, labels.values), selections, record)

  def _table(self, step: int) -> StepTable:
    """The steps of an iteration, with noise only where the method's window has it."""
    table = self._sys.pipeline.table
    if self._data.window is None:
      return table
    scale = np.asarray(table.noise_scale) * np.asarray(self._data.window(step), np.float32)
    return dataclasses.replace(table, noise_scale=scale)

  def _noisy_steps(self, step: int) -> list[int]:
    """Those of an iteration; ValueError if there are none."""
    return Process(self._table(step), self._sys.process.transition).stochastic_steps()

  def _trained_steps(self, step: int) -> Sequence[int] | None:
    """Those of an iteration where they move; None where they are the plan's."""
    if self._data.window is None or self._data.by != "step":
      return None
    return batching.window_of(self._noisy_steps(step), self._timestep_range)

  def _sample(
    self, state: TrainState, step: int, chosen: np.ndarray, table: StepTable
  ) -> tuple[Any, Scores, dict[str, float | None]]:
    """`(what was sampled for the records `chosen` [P], its scores, metrics)`."""
    plan, sys = self.plan, self._sys
    by = self._data.sampled_by
    params = state.params if by == "policy" else state.copies[by]
    frozen = self._frozen(state)
    record_ids = np.repeat(chosen, plan.group_size)
    parts, pending, kl = [], [], []
    for j, ids in enumerate(np.split(record_ids, plan.microbatches)):
      noise = (self._seed, streams.number("rollout"), step, j, self._start, table)
      sampled = sys.sample_fn(params, sys.frozen, system.take(self.tokens, ids), *noise)
      parts.append(sampled)
      pending.append(self.scorer.submit(sampled.samples, ids))
      if self._data.kl_weight:
        kl.append(sys.kl_fn(params, frozen, sampled, table))
    # Until here nothing has waited for the devices, and the stacking is under way too.
    collected = self._collect_fn(parts)
    with scored.saving_rejected(sys.model.modality, self._workdir, step):
      named = self.scorer.gather(pending)
    nats = np.concatenate(jax.device_get(kl)) if kl else np.zeros(plan.samples, np.float32)
    scores, record = scored.scores_of(
      self._rewards, named, chosen, nats, kl_weight=self._data.kl_weight
    )
    return collected, scores, record | ({"kl/to_ref": float(nats.mean())} if kl else {})

  def _frozen(self, state: TrainState) -> Mapping[str, Params]:
    """The frozen trees, with the copy that is the reference where the method has one."""
    sys = self._sys
    # The KL that samples pay for has to be the one that the loss takes the gradient of.
    if "reference" not in state.copies:
      return sys.frozen
    copy = sys.policy.variables(state.copies["reference"], sys.frozen["base"])
    return {**sys.frozen, "reference": copy}

  def _starts(self, microbatch: int) -> np.ndarray | None:
    """Which noise each of a microbatch starts from: its group's first, if they share it."""
    samples = np.arange(microbatch, dtype=np.int32)
    group = self.plan.group_size
    return samples // group * group if self._data.shared_noise else None

  def _label_shapes(self, num_records: int, group_size: int) -> Labels:
    """The labels of P records with K samples each, as shapes."""
    rows = jax.ShapeDtypeStruct((num_records, group_size), np.float32)
    ids = jax.ShapeDtypeStruct((num_records,), np.int32)
    weight = jax.ShapeDtypeStruct((), np.float32)
    names = list(self._rewards.weight_of)
    valid = jax.ShapeDtypeStruct(rows.shape, np.bool_)
    named, weights = dict.fromkeys(names, rows), dict.fromkeys(names, weight)
    scores = Scores(rows, named, weights, penalty=rows, record=ids, group=ids, valid=valid)
    memory = jax.eval_shape(self.init_memory)
    return jax.eval_shape(self._data.label, memory, scores, streams.key_shape())[1]

  def _count_examples(self, num_records: int, group_size: int) -> tuple[int, int]:
    """A `batching.CountFn`."""
    samples = self._label_shapes(num_records, group_size).samples.shape
    return samples[0], int(np.prod(samples[1:]))

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The gap is of the first update alone, where the parameters are still those that sampled."""
    record = averages(updates)
    if "policy/ratio" in record:
      record["policy/ratio_mean"] = record.pop("policy/ratio")
      record["policy/first_ratio_max_error"] = float(np.abs(updates[0]["policy/ratio"] - 1).max())
      if self._exactness is not None and self._data.sampled_by == "policy":
        record |= self._exactness.metrics(updates[0][exactness.GAP])
    return record

  def check(self, record: Mapping[str, float], step: int) -> str | None:
    if self._exactness is None or exactness.SHARE not in record:
      return None
    transitions = self.plan.slices * self.plan.slice_size
    return self._exactness.problem(record, step, transitions)

  def program(self, state: TrainState, microbatch: int) -> Program:
    rows = np.resize(np.arange(len(self.records)), microbatch)
    noise = (self._seed, streams.number("rollout"), 0, 0, self._starts(microbatch), self._table(0))
    args = (state.params, self._sys.frozen, system.take(self.tokens, rows), *noise)
    return Program("rollout", self._sys.sample_fn, args)

  def shapes(self, state: TrainState) -> tuple[Any, batching.Selection]:
    # Traced, not run: a dry run for devices that are not there has nothing to run on.
    _, function, args = self.program(state, self.microbatch)
    sampled = jax.eval_shape(function, *args)
    parts = [sampled] * self.plan.microbatches
    mesh = self._sys.mesh
    collected = sharding.shaped(
      jax.eval_shape(self._collect_fn, parts), collected_shardings(self._data.by, mesh)
    )
    labels = self._label_shapes(self.plan.num_records, self.plan.group_size)
    labels = sharding.shaped((labels.samples, labels.values), sharding.replicated(mesh))
    selection = batching.selections(self.plan, self._seed, 0)[0]
    return (collected, self._table(0), *labels), selection

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    self.scorer.close()


def select_fn(data: Rollouts) -> SelectFn:
  """`Feed.select` of online data: each example from the device that sampled it."""

  def steps(collected, selected: batching.Selection) -> Steps:
    (rollout, cond), table, samples, values = collected
    example, i, fresh = selected
    of_each = jnp.asarray(samples)[example]  # [b], or [b, n] samples of one record
    lists = of_each.ndim > 1
    picked, own = pick_steps(rollout, cond.cond, of_each, i[:, None] if lists else i)
    x_t, x_s, log_prob = picked
    return Steps(
      x_t=x_t,
      x_s=x_s,
      row=table[jnp.asarray(i)],
      cond=cond._replace(cond=first_of_each(own) if lists else own),
      log_prob=log_prob,
      fresh=jnp.asarray(fresh),
      labels=labels_of(values, example),
    )

  def finished(collected, selected: batching.Selection) -> Finished:
    stacked, _, samples, values = collected
    of_each = jnp.asarray(samples)[selected.example]

    def pick(stacked, place):
      j, row = place
      return jax.tree.map(lambda leaf: leaf[j, row], stacked)

    x_0, cond = sharding.pick_own_rows(pick, stacked, 1, of_each)
    cond = first_of_each(cond) if of_each.ndim > 1 else cond
    return Finished(x_0, cond, labels_of(values, selected.example))

  return steps if data.by == "step" else finished


def first_of_each(tree: Any) -> Any:
  """`[b, n, ...]` leaves to `[b, ...]`: the samples of an example have one condition."""
  return jax.tree.map(lambda leaf: leaf[:, 0], tree)


def labels_of(values: Any, example: Array) -> Any:
  """`[b, ...]` of the examples `[b]`."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[example], values)


def pick_steps(rollout: Rollout, cond: Any, sample: Array, i: Array) -> tuple[Any, Any]:
  """`((x_t, x_s, log_prob), cond)` of steps `i` of samples, each from the device that sampled it.

  `sample` is `[b]` or `[b, 2]`, and `i` goes with it; so do the leading axes of what is returned.
  """

  def pick(stacked, place, i):
    (rollout, cond), (j, row) = stacked, place
    # A trajectory has one state more than steps: step i leads from x[i] to x[i + 1].
    steps = rollout.x[i, j, row], rollout.x[i + 1, j, row], rollout.log_prob[i, j, row]
    return steps, jax.tree.map(lambda leaf: leaf[j, row], cond)

  return sharding.pick_own_rows(pick, (rollout, cond), (2, 1), sample, i)


def collect(parts: list[Sampled]) -> Trajectories:
  """Stacks the microbatches of an iteration; each device keeps what it has sampled."""
  # Steps stay in front; microbatches become an axis of their own, so that nothing crosses devices.
  rollout = jax.tree.map(
    lambda *leaves: jnp.stack(leaves, axis=1), *[sampled.rollout for sampled in parts]
  )
  # The empty condition is the same in all of them.
  cond = stack([sampled.cond.cond for sampled in parts])
  return rollout, parts[0].cond._replace(cond=cond)


def collect_finished(parts: list[Sampled]) -> tuple[Array, Any]:
  """As `collect`, of which finished samples and their conditioning alone are kept."""
  return stack([(sampled.x_0, sampled.cond.cond) for sampled in parts])


def collected_shardings(by: str, mesh: jax.sharding.Mesh) -> Any:
  """Where `collect` leaves trajectories, or finished samples, in the shape of a prefix of them."""
  if by == "sample":
    return sharding.batch(mesh, axis=1)
  cond = guidance.Guided(sharding.batch(mesh, axis=1), sharding.replicated(mesh))
  return sharding.batch(mesh, axis=2), cond
