"""The main job: draw what the method learns from, update; again.

Read `train` from top to bottom. What an iteration draws, trajectories with rewards, stored pairs or
records, is the business of the method's feed; everything else is the same for every method.
"""

import contextlib
import functools
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from jaxalign import checks
from jaxalign.cli import sections as sections_lib
from jaxalign.distributed import hosts, sharding
from jaxalign.evaluation import evaluation as evaluation_lib
from jaxalign.evaluation import pictures, precision
from jaxalign.rewards import retry
from jaxalign.training import checkpoint, curve, feeds, guard, metrics, self_check
from jaxalign.training import dry_run as dry_run_lib
from jaxalign.training import setup as setup_lib
from jaxalign.training import state as state_lib
from jaxalign.training import workdir as workdir_lib
from jaxalign.training.state import TrainState


class Parts(NamedTuple):
  """setup: model, method, rewards, optimizer. bounds: of a guard, None without one."""

  setup: setup_lib.Setup
  evaluations: evaluation_lib.Evaluations
  bounds: guard.Guard | None
  feed: feeds.Feed


def train(config, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
  """Runs the config in `workdir`, continuing what was stopped there before."""
  # The parts, each from its own section of the config.
  workdir, sections = pathlib.Path(workdir), config.to_dict()
  section = functools.partial(checks.call_section, sections)
  setup, evaluations, bounds, feed = make_parts(sections, workdir)
  sys, (validation, test) = setup.system, evaluations
  print(feed.describe(), flush=True)

  # The programs, and the state that they carry.
  compilations = metrics.CompilationCounter()
  state = setup.init_state(feed.init_memory())
  update_fn = setup.jit_update(state, feed.select)
  end_fn = state_lib.jit_end(sys.mesh, sharding.params(state, sys.mesh))
  if dry_run:
    with feed:
      dry_run_lib.rehearse(feed, update_fn, state, setup.frozen)
    return

  # A new run, or the rest of one that was stopped.
  with workdir_lib.prepared(workdir, config, sys.model.corrections):
    checkpoints = section("checkpoint", checkpoint.Manager, workdir=workdir)
    state = checkpoints.restore_latest(state)
    start = int(state.step)
    writer = section("log", metrics.make_writer, workdir=workdir, start_step=start)
    shown = {"workdir": workdir, "evaluation": evaluations.shown, "writer": writer}
    draw = section("samples", pictures.Samples, **shown)
    last, every = config.num_iterations, sections["evaluation"].get("every", 0)
    check_fn = make_self_check(sections, sys, evaluations.shown, workdir)
    floor = measure_floor(sys, evaluations.shown) if start == 0 else None
    base = validation.run(sys, sys.policy.params).means("eval/") if bounds else {}
    settings = {name: sections[name] for name in ("process", "guidance")} | (
      validation.settings if validation else {}
    )
    watch = guard.Watch(bounds, base, workdir, start, settings)
    verdict = watch.verdict()

    with (
      stop_on_signal() as stop,
      checkpoints,
      feed,
      tqdm.trange(
        start, last, initial=start, total=last, disable=not hosts.is_first()
      ) as iterations,
    ):
      for step in () if verdict.stop else iterations:
        if draw.every and step % draw.every == 0:
          draw.save(step, sys, state)
        began = time.perf_counter()

        # What this iteration learns from: records, samples, rewards, as the method wants them.
        state, data, selections, record = feed.draw(state, step)

        # Loss and update. In the first one the parameters are still those that sampled.
        updates = []
        for j, selection in enumerate(selections):
          state, values = update_fn(state, setup.frozen, data, selection, config.seed, step, j)
          updates.append(values)
        state = end_fn(state, setup.decays(step))

        # Log, check, save.
        record |= feed.summarize(jax.device_get(updates))
        record[f"throughput/{feed.unit}_per_s"] = feed.num_samples / (time.perf_counter() - began)
        unfit = check_fn(state, record) if step == 0 else None
        record["compile/count"] = compilations.count
        record |= floor.metrics() if floor is not None and step == 0 else {}
        evaluated = every > 0 and (step + 1) % every == 0
        if evaluated:
          scores = validation.run(sys, state.sampling_params, kl=validation.kl)
          record |= scores.means("eval/")
        writer.write(step, record)
        problem = feed.check(record, step) or unfit
        if evaluated:
          verdict = watch.look(state, record)
        iterations.set_postfix_str(progress_line(record, feed.unit))
        stopping = hosts.any_of_them(stop.is_set())
        ends = stopping or verdict.stop or step + 1 == last or problem is not None
        checkpoints.save(step + 1, state, force=ends)
        if problem is not None:
          checkpoints.close()
          raise ValueError(problem)
        if ends:
          break

    # The verdict: the test records, on which nothing was chosen, against the base model.
    checkpoints.close()
    if int(state.step) < last and not verdict.stop:
      print(f"stopped after iteration {int(state.step)}; the same command continues", flush=True)
    else:
      if verdict.stop:
        state = watch.end(setup.init_state(feed.init_memory()))
        print(f"ended by the guard; its best iteration is {int(state.step)}", flush=True)
      draw.save(int(state.step), sys, state)
      comparison = test.compare_with_base(
        sys, state.sampling_params, kl_floor=precision.recorded_kl(workdir)
      )
      if hosts.is_first():
        comparison.write(workdir)
        curve.save_curve(metrics.read(workdir), workdir / "reward_curve.png")
      print(comparison.table(), flush=True)
      print(f"{compilations.count} programs compiled; everything is in {workdir}", flush=True)
    watch.close()
    writer.close()


def make_parts(sections: Mapping[str, Any], workdir: str | os.PathLike) -> Parts:
  """The parts of a run; ValueError for all that can be wrong with a config before anything runs."""
  workdir = pathlib.Path(workdir)
  sections_lib.check(sections)
  section = functools.partial(checks.call_section, sections)
  setup = setup_lib.assemble(sections, section("mesh", sharding.make_mesh))
  sys = setup.system
  evaluations = section(
    "evaluation",
    evaluation_lib.make_evaluations,
    known=setup.rewards.rewards if setup.rewards else (),
    retry=retry.of_section(sections.get("reward_pool", {})),
  )
  test = evaluations.test
  bounds = section(
    "guard",
    guard.make,
    rewards=sections["evaluation"]["rewards"],
    every=sections["evaluation"].get("every", 0),
    kl=test.kl,
    has_kl=bool(sys.process.noisy_steps()),
  )
  sharding.check_batch("config.evaluation.microbatch", test.microbatch, sys.mesh)
  for evaluation in filter(None, evaluations):
    evaluation.check(sys.model)
  return Parts(setup, evaluations, bounds, feeds.make(setup, workdir))


def make_self_check(sections, sys, evaluation, workdir):
  """`(state, record) -> problem | None` of the first iteration, see `self_check.run`."""
  action = checks.call_section(sections, "self_check", self_check.make)
  shown = evaluation.records[evaluation.ids[: evaluation.microbatch]]

  def check(state: TrainState, record) -> str | None:
    return self_check.run(
      action,
      workdir,
      sys,
      state,
      record,
      shown,
      targets=sections["lora"]["targets"],
      sampling={"microbatch": evaluation.microbatch, "seed": evaluation.seed},
    )

  return check


def measure_floor(sys, evaluation) -> precision.Floor | None:
  """What rounding makes log-ratios and KLs read, on the evaluation's first records; says it too."""
  ids = np.resize(evaluation.ids, evaluation.microbatch)
  tokens = sys.model.tokenize(evaluation.records[ids])
  floor = precision.measure(sys, tokens, seed=evaluation.seed)
  if floor is not None:
    print(f"{sys.model.dtype}: {floor}", flush=True)
  return floor


def progress_line(record: dict[str, float | None], unit: str) -> str:
  """What the progress bar shows of an iteration."""
  shown = "reward/mean" if "reward/mean" in record else "loss/total"
  per_s = record[f"throughput/{unit}_per_s"]
  value = "none" if record[shown] is None else f"{record[shown]:.3f}"
  return f"{shown.split('/')[0]} {value}, {per_s:.1f} {unit}/s"


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
