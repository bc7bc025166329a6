"""The main job: sample, reward, estimate advantages, update; again.

Read `train` from top to bottom: every line of its loop is one step of the algorithm.
"""

import contextlib
import dataclasses
import functools
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
  methods,
  metrics,
  optim,
  pictures,
  rehearsal,
  run,
  system,
  update,
)
from jaxalign import evaluation as evaluation_lib
from jaxalign.data import prompts as prompts_lib
from jaxalign.rewards import combine
from jaxalign.rewards.contract import RewardError
from jaxalign.rewards.pool import RewardPool
from jaxalign.state import TrainState, init_state


def train(config, workdir: pathlib.Path, *, dry_run: bool = False) -> None:
  """Runs the config in `workdir`, continuing what was stopped there before."""
  # The parts, each from its own section of the config.
  sections = config.to_dict()
  section = functools.partial(checks.call_section, sections)
  check_numbers(config)
  prompts = section("data", prompts_lib.load)
  rewards = section("reward", combine.make_total)
  evaluation = section("evaluation", evaluation_lib.make_evaluation)
  sys = system.from_config(sections)
  method = section("method", methods.make, process=sys.process, denoise_fn=sys.denoise_fn)
  plan = section("batch", batching.solve, steps=sys.process.stochastic_steps())
  check_method(method, plan)
  print(plan.describe(), flush=True)
  estimator = section(
    "advantage",
    advantages.make,
    num_groups=plan.num_prompts,
    group_size=plan.images_per_prompt,
  )
  tx = section("optim", optim.make)
  token_ids = sys.model.tokenize([record["prompt"] for record in prompts.records])

  # The programs, and the state that they carry.
  compilations = metrics.CompilationCounter()
  estimate_fn = jax.jit(estimator.estimate)
  update_fn = update.jit_update(method, tx, sys.policy.variables, ema_decay=config.ema_decay)
  stats = estimator.init(len(prompts))
  state = init_state(sys.policy.params, tx, stats, with_ema=config.ema_decay > 0)
  if dry_run:
    rehearsal.rehearse(plan, sys, update_fn, state, token_ids)
    return

  # A new run, or the rest of one that was stopped.
  run.prepare_workdir(workdir, config)
  checkpoints = section("checkpoint", checkpoint.Manager, workdir=workdir)
  state = checkpoints.restore_latest(state)
  start = int(state.step)
  writer = section("log", metrics.Writer, workdir=workdir, start_step=start)
  draw = section("samples", Samples, workdir=workdir, evaluation=evaluation, writer=writer)
  last = config.num_iterations

  with (
    stop_on_signal() as stop,
    section("reward_pool", RewardPool, total=rewards) as pool,
    tqdm.trange(start, last, initial=start, total=last) as iterations,
  ):
    for step in iterations:
      if draw.every and step % draw.every == 0:
        draw.save(step, sys, state, plan.microbatch)
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
      group = np.unique(prompt_ids, return_inverse=True)[1].astype(np.int32)
      stats, advantage = estimate_fn(state.stats, total, prompt_ids, group)
      state = dataclasses.replace(state, stats=stats)

      # Loss and update. The first update sees the parameters that sampled: its ratio must be 1.
      updates = []
      for j, selection in enumerate(batching.selections(plan, config.seed, step)):
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
      checkpoints.save(step + 1, state, force=stop.is_set() or step + 1 == last)
      if stop.is_set():
        break

  # The verdict: held-out prompts, against the base model, on the same noise.
  checkpoints.close()
  if int(state.step) < last:
    print(f"stopped after iteration {int(state.step)}; the same command continues", flush=True)
  else:
    draw.save(last, sys, state, plan.microbatch)
    comparison = evaluation.compare_with_base(sys, state.sampling_params, plan.microbatch)
    comparison.write(workdir)
    pictures.save_curve(metrics.read(workdir), workdir / "reward_curve.png")
    print(comparison.table(), flush=True)
    print(f"{compilations.count} programs compiled; everything is in {workdir}", flush=True)
  writer.close()


def check_numbers(config) -> None:
  """Raises ValueError for a number that would be found wrong only after hours, or never."""
  checks.check_call("config.exactness", check_log_prob_gap, 0.0, 0, **config.exactness)
  checks.check_seed("config.seed", config.seed)
  if config.num_iterations < 1:
    raise ValueError(f"config.num_iterations: expected at least 1, got {config.num_iterations}")
  if not 0.0 <= config.ema_decay < 1.0:
    raise ValueError(
      f"config.ema_decay: expected 0 (no average) up to below 1, got {config.ema_decay}"
    )


def check_method(method: methods.Method, plan: batching.BatchPlan) -> None:
  """Raises ValueError if this flow or its updates are not what the method needs."""
  if method.data != "rollout":
    raise ValueError(f"config.method: expected a method fed by rollouts, got {method.data!r}")
  if method.on_policy and plan.updates > 1:
    raise ValueError(
      f"config.method: it has no ratio to correct a second update, and the batch asks for "
      f"{plan.updates}\nset config.batch.updates_per_epoch and num_epochs to 1"
    )


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
  """An event that SIGTERM (a preemption) or Ctrl-C sets; the loop then ends with its iteration.

  A second signal acts as it would without this.
  """
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop  # only the main thread may handle signals
    return
  previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

  def restore():
    for number, handler in previous.items():
      signal.signal(number, handler)

  def handle(*_):
    stop.set()
    restore()

  for number in previous:
    signal.signal(number, handle)
  try:
    yield stop
  finally:
    restore()


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


@dataclasses.dataclass(frozen=True)
class Samples:
  """Writes samples/step_NNNNNN.png: the same prompts and the same noise every time.

  Attributes:
    every: iterations between pictures; 0 draws the last one only.
    num_images: in each picture.
  """

  workdir: pathlib.Path
  evaluation: evaluation_lib.Evaluation
  writer: metrics.Writer
  every: int
  num_images: int

  def save(self, step: int, sys: system.System, state: TrainState, microbatch: int) -> None:
    """Draws the picture of `step`. The first one is scored too.

    So an evaluation whose rewards do not fit the images fails before the training, not after it.
    """
    prompts, images = self.evaluation.sample(
      sys, state.sampling_params, microbatch, num_images=self.num_images
    )
    if step == 0:
      self.evaluation.rewards.score(images, prompts)
    picture = pictures.grid(images, [record["prompt"] for record in prompts], columns=8)
    path = self.workdir / "samples" / f"step_{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    self.writer.image(step, "samples", np.asarray(picture))
