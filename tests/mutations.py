"""Deliberate bugs: each a line of the package replaced, and the test files that must notice.

A green suite says little about lines that no test watches, above all about what is handed from one
part to the next: such a mistake is the same on both sides of every comparison of a run with itself.
`test_mutations.py` makes each of these mistakes and demands that the suite fails. Whoever changes a
line here keeps its mistake up to date, and whoever writes a feed adds the mistakes it invites.
"""

import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
  """A mistake.

  name: what goes wrong.
  file: under `jaxalign/`.
  old: exact text that occurs once in it.
  new: what stands there instead.
  tests: test files, under `tests/`, that have to fail; the cheapest that do.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]

  def apply(self, text: str) -> str:
    """The file's text with the mistake in it; ValueError unless it has one place for it."""
    if (count := text.count(self.old)) != 1:
      raise ValueError(f"{self.name}: expected its text once in {self.file}, found {count} times")
    return text.replace(self.old, self.new)


ONLINE = ("training/test_online_feed.py",)
RECORDS = ("training/test_records_feed.py",)
STORED = ("training/test_stored_feed.py",)
UPDATE = ("training/test_update.py",)
SYSTEM = ("test_system.py",)
AVERAGE = ("test_average.py",)
LOOP = ("test_loop.py",)
GUARD = ("training/test_guard.py",)
EVALUATION = ("evaluation/test_evaluation.py",)
SCORING = ("rewards/test_scoring.py",)
POOL = ("rewards/test_reward_pool.py",)
TIME = ("rewards/test_time.py",)
LABELS = ("labels/test_abstention.py",)
BEST_OF_N = ("steering/test_best_of_n.py",)

# That were once made all at once, in code of those days, and left the suite green.
REVIEWED = [
  Mutant(
    "the KL is added to the reward",
    "training/feeds/scored.py",
    "total=(total - penalty).reshape(rows),",
    "total=(total + penalty).reshape(rows),",
    ONLINE,
  ),
  Mutant(
    "all records of a batch are one group",
    "training/feeds/scored.py",
    "group=np.unique(chosen, return_inverse=True)[1].astype(np.int32)",
    "group=np.zeros(len(chosen), np.int32)",
    ONLINE,
  ),
  Mutant(
    "pairs do not share their first noise",
    "training/feeds/online.py",
    "if self._data.shared_noise else None",
    "if False else None",
    ONLINE,
  ),
  Mutant(
    "the dropout of conditions is inverted",
    "training/feeds/stored.py",
    "rng.random(len(rows)) < self._dropout)",
    "rng.random(len(rows)) >= self._dropout)",
    STORED,
  ),
  Mutant(
    "texts are shifted against their images",
    "training/feeds/stored.py",
    "tokens = system.take(self.tokens, rows)",
    "tokens = system.take(self.tokens, np.roll(rows, 1))",
    STORED,
  ),
  Mutant(
    "every label counts as certain",
    "training/feeds/stored.py",
    "labels=system.take(self.examples.values, rows[part]),",
    "labels=jax.tree.map(np.ones_like, system.take(self.examples.values, rows[part])),",
    STORED,
  ),
  Mutant(
    "every slice has the queries of the first records",
    "training/feeds/records.py",
    "self._query_of(ids[part])",
    "self._query_of(ids[: len(part)])",
    RECORDS,
  ),
  Mutant(
    "the key of the steps is that of the initial noise",
    "system.py",
    "return sample(params, frozen, tokens, x_T, key_steps, table)",
    "return sample(params, frozen, tokens, x_T, key_start, table)",
    SYSTEM,
  ),
  Mutant(
    "every microbatch is encoded with the same noise",
    "system.py",
    'key = streams.stream(seed, "encoding", i, j)',
    'key = streams.stream(seed, "encoding", i, 0)',
    SYSTEM,
  ),
  Mutant(
    "all slices share a key",
    "training/update.py",
    'key_slice = streams.stream(seed, "loss", i, j, number)',
    'key_slice = streams.stream(seed, "loss", i, j, 0)',
    UPDATE,
  ),
  Mutant(
    "the key of a loss does not depend on the iteration",
    "training/update.py",
    'key_slice = streams.stream(seed, "loss", i, j, number)',
    'key_slice = streams.stream(seed, "loss", 0, j, number)',
    UPDATE,
  ),
  Mutant(
    "evaluations during the run are of the raw parameters",
    "train.py",
    "validation.run(sys, state.sampling_params, kl=validation.kl)",
    "validation.run(sys, state.params, kl=validation.kl)",
    AVERAGE,
  ),
  Mutant(
    "the final comparison is of the raw parameters",
    "train.py",
    "sys, state.sampling_params, kl_floor=precision.recorded_kl(workdir)",
    "sys, state.params, kl_floor=precision.recorded_kl(workdir)",
    AVERAGE,
  ),
  Mutant(
    "a run is read back with the raw parameters",
    "training/workdir.py",
    'state["copies"].get(AVERAGE, state["params"])',
    'state["params"]',
    AVERAGE,
  ),
  Mutant(
    "every piece is scored with the first records",
    "evaluation/judging.py",
    "self._rewards.on_host(samples[piece], records[piece], self._retry)",
    "self._rewards.on_host(samples[piece], records[: len(samples[piece])], self._retry)",
    EVALUATION,
  ),
  Mutant(
    "base and aligned are swapped in the categories",
    "evaluation/comparison.py",
    '{"base": before_by[category], "aligned": after_by[category]}',
    '{"base": after_by[category], "aligned": before_by[category]}',
    EVALUATION,
  ),
]

FEEDS = [
  Mutant(
    "every microbatch of an iteration has the same noise",
    "training/feeds/online.py",
    'streams.number("rollout"), step, j, self._start, table)',
    'streams.number("rollout"), step, 0, self._start, table)',
    ONLINE,
  ),
  Mutant(
    "every iteration has the same noise",
    "training/feeds/online.py",
    'streams.number("rollout"), step, j, self._start, table)',
    'streams.number("rollout"), 0, j, self._start, table)',
    ONLINE,
  ),
  Mutant(
    "single trajectories share their first noise",
    "training/feeds/online.py",
    "if self._data.shared_noise else None",
    "if True else None",
    ONLINE,
  ),
  Mutant(
    "the noise that is shared is another group's",
    "training/feeds/online.py",
    "samples // group * group",
    "samples % group",
    ONLINE,
  ),
  Mutant(
    "rewards are asked of the records in reverse",
    "rewards/scoring.py",
    "self._pool.submit(held, self._records[ids[rows]])",
    "self._pool.submit(held, self._records[ids[rows[::-1]]])",
    ONLINE,
  ),
  Mutant(
    "samples are made of the first microbatch's records",
    "training/feeds/online.py",
    "system.take(self.tokens, ids), *noise)\n      parts",
    "system.take(self.tokens, record_ids[: len(ids)]), *noise)\n      parts",
    ONLINE,
  ),
  Mutant(
    "the logged reward is the normalised one",
    "training/feeds/scored.py",
    "raw = rewards.raw(named)",
    "raw = total",
    ONLINE,
  ),
  Mutant(
    "statistics of rewards are not remembered",
    "training/feeds/online.py",
    "state = dataclasses.replace(state, memory=memory)",
    "state = dataclasses.replace(state, memory=state.memory)",
    ONLINE,
  ),
  Mutant(
    "a step ends where it began",
    "training/feeds/online.py",
    "rollout.x[i + 1, j, row]",
    "rollout.x[i, j, row]",
    ONLINE,
  ),
  Mutant(
    "the row of the step table is the step's before",
    "training/feeds/online.py",
    "row=table[jnp.asarray(i)],",
    "row=table[jnp.asarray(i) - 1],",
    ONLINE,
  ),
  Mutant(
    "a copy samples where the policy should",
    "training/feeds/online.py",
    'state.params if by == "policy" else state.copies[by]',
    "state.params",
    ONLINE,
  ),
  Mutant(
    "the ratio to a copy is taken for 1",
    "training/feeds/online.py",
    'if self._data.sampled_by != "policy":',
    "if False:",
    ONLINE,
  ),
  Mutant(
    "the window of noise stays where it was",
    "training/feeds/online.py",
    "np.asarray(self._data.window(step), np.float32)",
    "np.asarray(self._data.window(0), np.float32)",
    ONLINE,
  ),
  Mutant(
    "steps outside the window are trained",
    "training/feeds/online.py",
    "selections(plan, self._seed, step, self._trained_steps(step))",
    "selections(plan, self._seed, step)",
    ONLINE,
  ),
  Mutant(
    "labels are drawn alike in every iteration",
    "training/feeds/online.py",
    'streams.stream(self._seed, "labels", step)',
    'streams.stream(self._seed, "labels", 0)',
    ONLINE,
  ),
  Mutant(
    "the KL is to the first reference for ever",
    "training/feeds/online.py",
    "kl.append(sys.kl_fn(params, frozen, sampled, table))",
    "kl.append(sys.kl_fn(params, sys.frozen, sampled, table))",
    ONLINE,
  ),
  Mutant(
    "finished samples have the labels of the first ones",
    "training/feeds/online.py",
    "return Finished(x_0, cond, labels_of(values, selected.example))",
    "return Finished(x_0, cond, labels_of(values, jnp.arange(len(x_0))))",
    ONLINE,
  ),
  Mutant(
    "rewards reach labels by the name of another",
    "training/feeds/scored.py",
    "named={name: values.reshape(rows) for name, values in named.items()},",
    "named=dict(zip(named, [v.reshape(rows) for v in named.values()][::-1])),",
    ONLINE,
  ),
  Mutant(
    "advantages are those of the first samples",
    "training/feeds/online.py",
    "labels=labels_of(values, example),",
    "labels=labels_of(values, jnp.arange(len(example))),",
    ONLINE,
  ),
  Mutant(
    "the worst of a group is preferred",
    "labels/pairs.py",
    "[jnp.argmax(high, axis=1), jnp.argmin(low, axis=1)]",
    "[jnp.argmin(low, axis=1), jnp.argmax(high, axis=1)]",
    ONLINE,
  ),
  Mutant(
    "a tie counts as a preference",
    "labels/pairs.py",
    "untied = gap > 0",
    "untied = gap >= 0",
    ONLINE,
  ),
  Mutant(
    "a pair has the condition of another",
    "training/feeds/online.py",
    "lambda leaf: leaf[:, 0], tree",
    "lambda leaf: leaf[::-1, 0], tree",
    ONLINE,
  ),
  Mutant(
    "the gap is measured after the last update",
    "training/feeds/online.py",
    "self._exactness.metrics(updates[0][exactness.GAP])",
    "self._exactness.metrics(updates[-1][exactness.GAP])",
    ONLINE,
  ),
  Mutant(
    "one of both bounds on the gap is enough",
    "training/feeds/exactness.py",
    "gap <= self.max_log_prob_gap and share <= self.max_share",
    "gap <= self.max_log_prob_gap or share <= self.max_share",
    ONLINE,
  ),
  Mutant(
    "another sample than the rejected one is saved",
    "rewards/pool.py",
    "held[error.index]",
    "held[0]",
    ONLINE,
  ),
  Mutant(
    "every iteration has the same records",
    "training/feeds/records.py",
    "self.records.draw_for_step(self._seed, step, self.plan.examples)",
    "self.records.draw_for_step(self._seed, 0, self.plan.examples)",
    RECORDS,
  ),
  Mutant(
    "condition and query are of different records",
    "training/feeds/records.py",
    "cond, query = pick_examples((data.cond.cond, data.query), selected)",
    "cond, query = pick_examples((data.cond.cond, data.query), selected)\n"
    "  query = jax.tree.map(lambda leaf: leaf[::-1], query)",
    RECORDS,
  ),
  Mutant(
    "every iteration encodes with the same noise",
    "training/feeds/stored.py",
    "samples, self._seed, step, j)",
    "samples, self._seed, 0, j)",
    STORED,
  ),
  Mutant(
    "the same places of a batch lose their condition in every iteration",
    "training/feeds/stored.py",
    'streams.generator(self._seed, "condition dropout", step)',
    'streams.generator(self._seed, "condition dropout", 0)',
    STORED,
  ),
  Mutant(
    "the loser of a pair comes first",
    "data/examples.py",
    "np.stack([found.winner, found.loser], axis=1)",
    "np.stack([found.loser, found.winner], axis=1)",
    STORED,
  ),
]

TRAINING = [
  Mutant(
    "the gradient is the sum over slices",
    "training/update.py",
    "lambda leaf: leaf / slices, total",
    "lambda leaf: leaf, total",
    UPDATE,
  ),
  Mutant(
    "the gradient is the last slice's",
    "training/update.py",
    "jax.tree.map(jnp.add, total, grads), devices), values",
    "jax.tree.map(jnp.add, zeros, grads), devices), values",
    UPDATE,
  ),
  Mutant(
    "the key of a loss does not depend on the update",
    "training/update.py",
    'key_slice = streams.stream(seed, "loss", i, j, number)',
    'key_slice = streams.stream(seed, "loss", i, 0, number)',
    UPDATE,
  ),
  Mutant(
    "the average stays where it began",
    "train.py",
    "state = end_fn(state, setup.decays(step))",
    "state = dataclasses.replace(state, step=state.step + 1)",
    AVERAGE,
  ),
  Mutant(
    "the norm of the gradient is that of the step",
    "training/update.py",
    '"grad/norm": optax.global_norm(grads)',
    '"grad/norm": optax.global_norm(updates)',
    UPDATE,
  ),
  Mutant(
    "the average decays by what it should keep",
    "training/state.py",
    "decay * old + (1.0 - decay) * new",
    "(1.0 - decay) * old + decay * new",
    UPDATE,
  ),
  Mutant(
    "the average begins at zero",
    "training/state.py",
    "own = {name: jax.tree.map(jnp.copy, params) for name in copies}",
    "own = {name: jax.tree.map(jnp.zeros_like, params) for name in copies}",
    UPDATE,
  ),
  Mutant(
    "the loss sees a copy made ready for the policy",
    "training/update.py",
    'variables_fn(copy, ready_fn(copy, frozen)["base"])',
    'variables_fn(copy, frozen["base"])',
    UPDATE,
  ),
  Mutant(
    "every update of a rollout passes for its first",
    "training/batching.py",
    "fresh = np.full(shape, not result)",
    "fresh = np.full(shape, True)",
    ONLINE,
  ),
  Mutant(
    "every iteration trains in the same order",
    "training/batching.py",
    'streams.generator(seed, "transitions", iteration)',
    'streams.generator(seed, "transitions", 0)',
    ONLINE,
  ),
  Mutant(
    "all samples of a slice are trained on the first one's steps",
    "training/batching.py",
    "i.reshape(-1, plan.slice_size, plan.timesteps).transpose(0, 2, 1)",
    "i.reshape(-1, plan.timesteps, plan.slice_size)",
    ONLINE,
  ),
  Mutant(
    "the loop gives every update the key of the first",
    "train.py",
    "data, selection, config.seed, step, j)",
    "data, selection, config.seed, step, 0)",
    LOOP,
  ),
  Mutant(
    "the loop forgets what the feed has remembered",
    "train.py",
    "state, data, selections, record = feed.draw(state, step)",
    "_, data, selections, record = feed.draw(state, step)",
    LOOP,
  ),
  Mutant(
    "pictures are of the raw parameters",
    "train.py",
    "sys, state.sampling_params, num_samples=self.num_samples",
    "sys, state.params, num_samples=self.num_samples",
    AVERAGE,
  ),
  Mutant(
    "a run that its guard ended is judged by its newest state",
    "train.py",
    "state = watch.end(setup.init_state(feed.init_memory()))",
    "watch.end(setup.init_state(feed.init_memory()))",
    AVERAGE,
  ),
  Mutant(
    "a guard bears one evaluation more than its patience",
    "training/guard.py",
    "since >= self.patience",
    "since > self.patience",
    GUARD,
  ),
  Mutant(
    "a guard keeps the newest state for the best",
    "training/guard.py",
    "if verdict.is_best:",
    "if True:",
    GUARD,
  ),
  Mutant(
    "that a guard has ended a run is not written",
    "training/guard.py",
    "self._write(ended=True)",
    "self._write(ended=False)",
    AVERAGE,
  ),
  Mutant(
    "the newest checkpoint of a run that a guard ended is taken",
    "training/workdir.py",
    'take == "newest" or (take == "chosen" and not kept.ended)',
    'take != "best"',
    AVERAGE,
  ),
  Mutant(
    "a strength has no effect",
    "training/workdir.py",
    "sys.policy.at_strength(params, strength)",
    "params",
    AVERAGE,
  ),
  Mutant(
    "a data file may be edited between two starts",
    "training/workdir.py",
    "_check_digests(workdir, found.get(DIGESTS, {}), digests, wanted)",
    "pass",
    ("training/test_workdir.py",),
  ),
]

SAMPLING = [
  Mutant(
    "samples do not start from the noise that they share",
    "system.py",
    "x_T = x_T if start is None else x_T[start]",
    "x_T = x_T",
    SYSTEM,
  ),
  Mutant(
    "guidance is away from the condition itself",
    "system.py",
    "model.condition(frozen, model.empty)",
    "model.condition(frozen, tokens)",
    SYSTEM,
  ),
  Mutant(
    "the KL is the policy's to itself",
    "system.py",
    'policy.variables(params, frozen["base"]),\n      frozen["reference"],',
    'policy.variables(params, frozen["base"]),\n      policy.variables(params, frozen["base"]),',
    SYSTEM,
  ),
  Mutant(
    "the KL is the mean over steps",
    "system.py",
    "return jnp.sum(kl, axis=0)",
    "return jnp.mean(kl, axis=0)",
    SYSTEM,
  ),
  Mutant(
    "all microbatches of an evaluation have the same noise",
    "system.py",
    'streams.number("evaluation"), part, j, None, self.pipeline.table)',
    'streams.number("evaluation"), part, 0, None, self.pipeline.table)',
    SYSTEM,
  ),
  Mutant(
    "all parts of an evaluation have the same noise",
    "evaluation/evaluation.py",
    '"part": PARTS.index(self.part)}',
    '"part": 0}',
    ("evaluation/test_evaluation_parts.py",),
  ),
  Mutant(
    "the base model of a comparison is the aligned one",
    "evaluation/evaluation.py",
    "base = self.run(sys, sys.policy.params)",
    "base = self.run(sys, params)",
    EVALUATION,
  ),
  Mutant(
    "the gain is the loss",
    "evaluation/statistics.py",
    "np.asarray(aligned, np.float64) - np.asarray(base, np.float64)",
    "np.asarray(base, np.float64) - np.asarray(aligned, np.float64)",
    EVALUATION,
  ),
  Mutant(
    "the interval takes samples of one record for independent",
    "evaluation/statistics.py",
    "_, inverse = np.unique(clusters, return_inverse=True)\n  totals",
    "inverse = np.arange(len(clusters))\n  totals",
    ("evaluation/test_statistics.py",),
  ),
  Mutant(
    "evaluate judges the base model",
    "evaluate.py",
    "found.system, found.params, kl_floor",
    "found.system, found.system.policy.params, kl_floor",
    AVERAGE,
  ),
  Mutant(
    "export writes the base model",
    "export.py",
    "policy.variables(found.params, policy.base)",
    "policy.variables(policy.params, policy.base)",
    AVERAGE,
  ),
  Mutant(
    "sample draws with the base model",
    "sample.py",
    "return found.system, found.params",
    "return found.system, found.system.policy.params",
    AVERAGE,
  ),
]

REWARDS = [
  Mutant(
    "rewards of microbatches are in the wrong order",
    "rewards/pool.py",
    "[future.result() for future in pending]",
    "[future.result() for future in reversed(pending)]",
    ONLINE,
  ),
  Mutant(
    "samples are scored unchecked",
    "rewards/pool.py",
    "check_samples(self._check, held)",
    "pass",
    ONLINE,
  ),
  Mutant(
    "the sum of rewards leaves out the weights",
    "rewards/combine.py",
    "weight * NORMALIZERS[normalize](values)",
    "NORMALIZERS[normalize](values)",
    ONLINE,
  ),
  Mutant(
    "every device reward has the first one's query",
    "rewards/combine.py",
    "part.name: _encode(part, records)",
    "part.name: _encode(self.device_parts[0], records)",
    RECORDS,
  ),
  Mutant(
    "a sample is compared with its whole group",
    "labels/advantages.py",
    "deviation * size / jnp.maximum(size - 1.0, 1.0)",
    "deviation",
    ONLINE,
  ),
  Mutant(
    "advantages are clipped from below alone",
    "labels/advantages.py",
    "jnp.clip(advantages, -limit, limit)",
    "jnp.maximum(advantages, -limit)",
    ("labels/test_advantages.py",),
  ),
  Mutant(
    "a record's statistics are those of the row before it",
    "labels/advantages.py",
    "row = jnp.where(is_kept, record_ids, num_records)",
    "row = jnp.where(is_kept, record_ids - 1, num_records)",
    ONLINE,
  ),
  Mutant(
    "a reward on the mesh has the queries of other records",
    "rewards/scoring.py",
    "lambda leaf: leaf[rows], query",
    "lambda leaf: leaf[rows[::-1]], query",
    SCORING,
  ),
  Mutant(
    "an evaluation on the mesh has the queries of other records",
    "evaluation/judging.py",
    "self._on_mesh.score(samples, self._query, rows)",
    "self._on_mesh.score(samples, self._query, rows % len(samples))",
    EVALUATION,
  ),
  Mutant(
    "a NaN sample that is scored on the mesh is let through",
    "rewards/scoring.py",
    "if fit is not None and not fit.all():",
    "if False:",
    SCORING,
  ),
  Mutant(
    "samples that no program checks are not checked at all",
    "rewards/scoring.py",
    "bool(total.host_parts) or on_mesh.modality.fit is None",
    "bool(total.host_parts)",
    SCORING,
  ),
  Mutant(
    "an evaluation has the run's rewards a second time",
    "train.py",
    "known=setup.rewards.rewards if setup.rewards else (),",
    "known=(),",
    ("test_scored_runs.py",),
  ),
  Mutant(
    "any reward of the same name counts as the same",
    "rewards/combine.py",
    "reward.name == name and dict(reward.kwargs) == dict(kwargs)",
    "reward.name == name",
    SCORING,
  ),
  Mutant(
    "the time of a noise level is dropped on the way to the reward",
    "rewards/contract.py",
    "self.score(params, samples, query, t=t)",
    "self.score(params, samples, query)",
    TIME,
  ),
  Mutant(
    "a sum of rewards keeps the time to itself",
    "rewards/combine.py",
    "part.value(params[part.name], samples, query[part.name], t)",
    "part.value(params[part.name], samples, query[part.name])",
    TIME,
  ),
  Mutant(
    "a pipeline keeps the time to itself",
    "pipeline.py",
    'device.value(frozen["rewards"], samples, query, t)',
    'device.value(frozen["rewards"], samples, query)',
    TIME,
  ),
  Mutant(
    "a time is ignored where none is taken",
    "rewards/contract.py",
    "if t is None:",
    "if t is None or not self.takes_time:",
    TIME,
  ),
  Mutant(
    "a reward that raises is not asked again",
    "rewards/retry.py",
    "attempts = self.num_retries + 1",
    "attempts = 1",
    POOL,
  ),
  Mutant(
    "every wait for another attempt is as long",
    "rewards/retry.py",
    "self.seconds * 2.0**attempt",
    "self.seconds",
    POOL,
  ),
  Mutant(
    "an evaluation does not ask again",
    "evaluation/judging.py",
    "records[piece], self._retry)",
    "records[piece])",
    EVALUATION,
  ),
]

ABSTENTION = [
  Mutant(
    "what stands under a mask is taken for a number",
    "rewards/contract.py",
    "np.where(masked, np.float32(np.nan), array)",
    "np.where(masked, np.float32(0), array)",
    SCORING,
  ),
  Mutant(
    "a mask excuses every value",
    "rewards/contract.py",
    "finite | masked",
    "finite | True",
    SCORING,
  ),
  Mutant(
    "a sample without a verdict counts as valid",
    "training/feeds/scored.py",
    "valid=valid.reshape(rows),",
    "valid=np.ones_like(valid).reshape(rows),",
    ONLINE,
  ),
  Mutant(
    "a reward without a weight makes samples invalid",
    "rewards/combine.py",
    "for name, weight in self.weight_of.items() if weight]",
    "for name, weight in self.weight_of.items()]",
    SCORING,
  ),
  Mutant(
    "no number of abstentions stops a run",
    "rewards/scoring.py",
    "if without.mean() <= limit:",
    "if True:",
    SCORING,
  ),
  Mutant(
    "an estimator from outside trains what has no verdict",
    "labels/advantages.py",
    "_known(jnp.ravel(jnp.asarray(scores.valid)), clipped)",
    "clipped",
    LABELS,
  ),
  Mutant(
    "what has no verdict counts in the size of its group",
    "labels/advantages.py",
    "jax.ops.segment_sum(valid.astype(shifted.dtype), group, num_groups)",
    "jax.ops.segment_sum(jnp.ones_like(shifted), group, num_groups)",
    LABELS,
  ),
  Mutant(
    "what has no verdict counts in the deviation of the batch",
    "labels/advantages.py",
    "jnp.std(shifted, where=valid)",
    "jnp.std(jnp.where(valid, shifted, 0.0))",
    LABELS,
  ),
  Mutant(
    "a history remembers what has no verdict",
    "labels/advantages.py",
    "num_earlier <= buffer_size) & valid",
    "num_earlier <= buffer_size)",
    LABELS,
  ),
  Mutant(
    "a history counts what has no verdict",
    "labels/advantages.py",
    "valid.astype(stats.count.dtype), mode",
    "1, mode",
    LABELS,
  ),
  Mutant(
    "the one that has a verdict is preferred to one that has none",
    "labels/pairs.py",
    "jnp.where(valid, total, jnp.inf)",
    "jnp.where(valid, total, -9.0)",
    LABELS,
  ),
  Mutant(
    "weights are of mean one over all samples",
    "labels/weights.py",
    "share * jnp.sum(valid)",
    "share * valid.size",
    LABELS,
  ),
  Mutant(
    "the best share is one of all samples",
    "labels/weights.py",
    "jnp.where(valid, rewards, jnp.nan)",
    "jnp.where(valid, rewards, 0.0)",
    LABELS,
  ),
]

STEERING = [
  Mutant(
    "a sampler ranks by the queries of other records",
    "system.py",
    "binding.on_device(self.rewards).encode(records))",
    "binding.on_device(self.rewards).encode(records[::-1]))",
    BEST_OF_N,
  ),
  Mutant(
    "the worst of n is kept",
    "steering/best_of_n.py",
    "(new.reward > best.reward)",
    "(new.reward < best.reward)",
    BEST_OF_N,
  ),
  Mutant(
    "the last of equals is kept",
    "steering/best_of_n.py",
    "(new.reward > best.reward)",
    "(new.reward >= best.reward)",
    BEST_OF_N,
  ),
  Mutant(
    "all draws but the first share their noise",
    "steering/best_of_n.py",
    "jax.random.fold_in(key, num_steps + k)",
    "jax.random.fold_in(key, num_steps + 1)",
    BEST_OF_N,
  ),
  Mutant(
    "all draws start from the first one's noise",
    "steering/best_of_n.py",
    "jnp.where(first, x_T, fresh)",
    "x_T",
    BEST_OF_N,
  ),
  Mutant(
    "a bound on a KL forgets that one of n is kept",
    "steering/best_of_n.py",
    "math.log(n) - (n - 1) / n",
    "math.log(n)",
    BEST_OF_N,
  ),
  Mutant(
    "an evaluation samples without its sampler",
    "evaluation/evaluation.py",
    "self.steered(sys).sample_all(",
    "sys.sample_all(",
    ("steering/test_steered_commands.py",),
  ),
  Mutant(
    "the base model of a comparison is sampled by another sampler",
    "evaluation/evaluation.py",
    "base = self.run(sys, sys.policy.params)",
    "base = dataclasses.replace(self, steered=lambda sys: sys).run(sys, sys.policy.params)",
    ("steering/test_steered_commands.py",),
  ),
]

MUTANTS = [*REVIEWED, *FEEDS, *TRAINING, *SAMPLING, *REWARDS, *ABSTENTION, *STEERING]
