"""The main job: sample, reward, estimate advantages, update; again.

Read `train` from top to bottom: every line of its loop is one step of the algorithm.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import numpy as np
import tqdm
from PIL import Image

from jaxalign import (
  advantages,
  batching,
  checkpoint,
  checks,
  files,
  methods,
  metrics,
  optim,
  pictures,
  rehearsal,
  system,
  update,
)
from jaxalign import evaluation as evaluation_lib
from jaxalign.data import prompts as prompts_lib
from jaxalign.rewards import combine
from jaxalign.rewards.contract import RewardError
from jaxalign.rewards.pool import RewardPool
from jaxalign.state import init_state

# What a run may change when it is continued: how long it goes on, and what it writes.
_MAY_CHANGE = ("num_iterations", "checkpoint", "log", "samples")


def train(config, workdir: pathlib.Path, *, dry_run: bool = False) -> None:
  """Runs the config in `workdir`, continuing what was stopped there before."""
  # The parts, each from its own section of the config.
  section = functools.partial(checks.call_section, config)
  num_steps = config.process.num_steps
  plan = section("batch", batching.solve, num_steps=num_steps)
  print(plan.describe(num_steps), flush=True)
  prompts = section("data", prompts_lib.load)
  rewards = section("reward", combine.from_names)
  evaluation = section("evaluation", evaluation_lib.make_evaluation)
  sys = system.from_config(config)
  method = section("method", methods.make, process=sys.process, denoise_fn=sys.denoise_fn)
  estimator = section("advantage", advantages.make, num_groups=plan.num_prompts)
  tx = section("optim", optim.make)
  token_ids = sys.model.tokenize([record["prompt"] for record in prompts.records])
  group = np.repeat(np.arange(plan.num_prompts, dtype=np.int32), plan.images_per_prompt)

  # The programs, and the state that they carry.
  compilations = metrics.CompilationCounter()
  estimate_fn = jax.jit(estimator.estimate)
  update_fn = update.jit_update(method, tx, sys.policy.variables, ema_decay=config.ema_decay)
  stats = estimator.init(len(prompts))
  state = init_state(sys.policy.params, tx, stats, with_ema=config.ema_decay > 0)
  if dry_run:
    rehearsal.rehearse(plan, num_steps, sys, update_fn, state, token_ids)
    return

  # A new run, or the rest of one that was stopped.
  prepare_workdir(workdir, json.loads(config.to_json()))
  checkpoints = checkpoint.Manager(workdir, **config.checkpoint)
  state = checkpoints.restore_latest(state)
  start = int(state.step)
  writer = metrics.Writer(workdir, start_step=start, **config.log)
  iterations = tqdm.trange(start, config.num_iterations, initial=start, total=config.num_iterations)

  with stop_on_sigterm() as stop, section("reward_pool", RewardPool, total=rewards) as pool:
    for step in iterations:
      if step % config.samples.every == 0:
        save_samples(workdir, step, sys, state, evaluation, plan, writer, **config.samples)
      began = time.perf_counter()

      # Rollout. Dispatch is asynchronous: one microbatch is scored while the next is sampled.
      chosen = prompts.draw_for_step(config.seed, step, plan.num_prompts)
      prompt_ids = np.repeat(chosen, plan.images_per_prompt)
      parts, pending = [], []
      for j, ids in enumerate(np.split(prompt_ids, plan.microbatches)):
        sampled = sys.sample_fn(state.params, sys.frozen, token_ids[ids], config.seed, step, j)
        parts.append((sampled.rollout, sampled.cond))
        pending.append(pool.submit(sampled.images, prompts[ids]))
      trajectories = update.collect(parts)

      # Reward and advantage.
      total, named = gather_rewards(pool, pending, workdir, step)
      stats, advantage = estimate_fn(state.stats, total, prompt_ids, group)
      state = dataclasses.replace(state, stats=stats)

      # Loss and update. The first update sees the parameters that sampled: its ratio must be 1.
      updates = []
      for j, selection in enumerate(batching.selections(plan, num_steps, config.seed, step)):
        state, values = update_fn(
          state, sys.frozen, trajectories, advantage, selection, config.seed, step, j
        )
        updates.append(values)
      state = dataclasses.replace(state, step=np.int32(step + 1))

      # Log, check, save.
      record = summarize(total, named, jax.device_get(updates))
      record["throughput/images_per_s"] = plan.images / (time.perf_counter() - began)
      record["compile/count"] = compilations.count
      if evaluation.every and (step + 1) % evaluation.every == 0:
        record |= evaluation.run(sys, state.sampling_params, plan.microbatch).means("eval/")
      writer.write(step, record)
      check_log_prob_gap(record["policy/log_prob_gap"], step, **config.exactness)
      iterations.set_postfix_str(
        f"reward {record['reward/mean']:.3f}, {record['throughput/images_per_s']:.1f} images/s"
      )
      is_last = stop.is_set() or step + 1 == config.num_iterations
      checkpoints.save(step + 1, state, force=is_last)
      if is_last:
        break

  # The verdict: held-out prompts, against the base model, on the same noise.
  checkpoints.close()
  if int(state.step) < config.num_iterations:
    print(f"stopped after iteration {int(state.step)}; the same command continues", flush=True)
  else:
    save_samples(workdir, int(state.step), sys, state, evaluation, plan, writer, **config.samples)
    comparison = evaluation.compare_with_base(sys, state.sampling_params, plan.microbatch)
    comparison.write(workdir)
    pictures.save_curve(metrics.read(workdir), workdir / "reward_curve.png")
    print(comparison.table(), flush=True)
    print(f"{compilations.count} programs compiled; everything is in {workdir}", flush=True)
  writer.close()


def prepare_workdir(workdir: pathlib.Path, config: dict) -> None:
  """Writes config.json into a new workdir; raises ValueError if another config's run is there."""
  path = workdir / "config.json"
  if path.exists():
    found = files.read_json(path)
    changed = [
      key
      for key in sorted(found.keys() | config.keys())
      if key not in _MAY_CHANGE and found.get(key) != config.get(key)
    ]
    if changed:
      raise ValueError(
        f"workdir {workdir} belongs to another config: config.{', config.'.join(changed)} "
        "differ(s) from its config.json\nchoose another --workdir, or repeat the first command"
      )
  workdir.mkdir(parents=True, exist_ok=True)
  files.write_json(path, config)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
  """An event that SIGTERM, the notice of a preemption, sets; the loop then ends its iteration."""
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop  # only the main thread may handle signals
    return
  previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
  try:
    yield stop
  finally:
    signal.signal(signal.SIGTERM, previous)


def gather_rewards(
  pool: RewardPool, pending: Sequence[futures.Future], workdir: pathlib.Path, step: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """`pool.gather`, saving the image that a reward could not score before its error goes on."""
  try:
    return pool.gather(pending)
  except RewardError as error:
    if error.image is None:
      raise
    path = workdir / f"rejected_step_{step:06d}.png"
    Image.fromarray(pictures.to_uint8(np.nan_to_num(error.image))).save(path)
    raise RewardError(f"iteration {step}: {error}\nits image is in {path}") from error


def summarize(
  total: np.ndarray, named: dict[str, np.ndarray], updates: list[dict[str, np.ndarray]]
) -> dict[str, float]:
  """The record of an iteration: rewards, then the updates' metrics averaged.

  `policy/log_prob_gap` is the largest over the first update alone, where the parameters are still
  those that sampled, so that any gap is one of numerics.
  """
  record = {"reward/mean": total.mean(), "reward/std": total.std()}
  record |= {f"reward/{name}": values.mean() for name, values in named.items()}
  record |= {name: np.mean([values[name] for values in updates]) for name in updates[0]}
  record["policy/ratio_mean"] = record.pop("policy/ratio")
  record["policy/first_ratio_max_error"] = np.abs(updates[0]["policy/ratio"] - 1).max()
  record["policy/log_prob_gap"] = updates[0]["policy/log_prob_gap"].max()
  return {name: float(value) for name, value in record.items()}


def check_log_prob_gap(gap: float, step: int, *, max_log_prob_gap: float) -> None:
  """Raises ValueError if rollout and update disagree about the policy that sampled."""
  if gap > max_log_prob_gap:
    raise ValueError(
      f"iteration {step}: log-probabilities of rollout and update differ by {gap:.2e}, more than "
      f"config.exactness.max_log_prob_gap = {max_log_prob_gap:.2e}\nimportance ratios are wrong by "
      "that much; use float32, or raise the bound if you accept it"
    )


def save_samples(
  workdir, step, sys, state, evaluation, plan, writer, *, every: int, num_images: int
) -> None:
  """Writes samples/step_NNNNNN.png: the same prompts and the same noise every time."""
  del every
  prompts, images = evaluation.sample(
    sys, state.sampling_params, plan.microbatch, num_images=num_images
  )
  picture = pictures.grid(images, [record["prompt"] for record in prompts], columns=8)
  path = workdir / "samples" / f"step_{step:06d}.png"
  path.parent.mkdir(exist_ok=True)
  picture.save(path)
  writer.image(step, "samples", np.asarray(picture))
