"""Over-optimisation, noticed: a reward that is not trained on, a KL budget, a diversity floor.

The verdict is a function of the evaluations that the guard has seen, in `guard.json` of the
workdir, so a run that was killed comes to the same one. Only those made as the next ones will be,
on the same records, noise, rewards and sampler, can be compared with them, and only of what the
guard has seen is the best state kept: nothing else counts.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tqdm

from jaxalign import files
from jaxalign.distributed import hosts
from jaxalign.training import checkpoint
from jaxalign.training.state import TrainState

ACTIONS = ("off", "warn", "stop")
RECORD = "guard.json"


class Kept(NamedTuple):
  """What the guard of a run has kept.

  step: iterations of its best state; 0 is the base model, of which nothing is stored.
  ended: whether it ended the run with that state.
  """

  step: int
  ended: bool


def kept(workdir: str | os.PathLike) -> Kept | None:
  """None if no guard has looked at the run yet."""
  workdir = pathlib.Path(workdir)
  path = workdir / RECORD
  if not path.exists():
    return None
  found = files.read_json(path)
  return Kept(int(found["best_step"]), bool(found["ended"]))


class Verdict(NamedTuple):
  """What the evaluations so far say.

  warnings: a sentence for each bound that the newest evaluation crosses.
  best_step: iterations finished at the highest gold reward; 0, the base model, if nothing beat it.
  is_best: whether the newest evaluation is that one.
  stop: whether the run must end.
  """

  warnings: tuple[str, ...]
  best_step: int
  is_best: bool
  stop: bool


class Guard(NamedTuple):
  """Bounds on a run, from the section `guard` of a config.

  gold: the evaluation's reward that decides which checkpoint is the best; "" sets no bound on it.
  patience: evaluations in a row without a new best gold reward that are borne.
  kl_budget: nats of trajectory KL to the reference; 0 sets no bound.
  diversity_floor: share of the base model's diversity that must remain; 0 sets no bound.
  action: "off", "warn", or "stop", which ends the run with the best checkpoint.
  """

  gold: str
  patience: int
  kl_budget: float
  diversity_floor: float
  action: str

  def judge(self, evaluations: Sequence[Mapping[str, float]], base: Mapping[str, float]) -> Verdict:
    """Judges the records, oldest first, whose keys are "step" and "eval/..."; at least one."""
    newest = evaluations[-1]
    golds = [record[f"eval/{self.gold}"] for record in evaluations] if self.gold else []
    steps = [int(record["step"]) + 1 for record in evaluations]
    best_step, since = 0, 0
    best = base.get(f"eval/{self.gold}")
    best = -math.inf if best is None else best
    for step, gold in zip(steps, golds, strict=False):
      since += 1
      if gold is not None and gold > best:  # None: not one verdict
        best, best_step, since = gold, step, 0
    warnings = []
    if golds and since >= self.patience:
      warnings.append(
        f"the gold reward {self.gold} is {in_words(golds[-1])} and has not passed {best:.3f}, of "
        f"iteration {best_step}, for {since} evaluations"
      )
    # Evaluations before a restart that set the budget may not have measured it.
    kl = newest.get("eval/kl_to_ref")
    if self.kl_budget and kl is not None and kl > self.kl_budget:
      warnings.append(
        f"the trajectory KL to the reference is {kl:.1f} nats, above the budget of "
        f"{self.kl_budget:g}"
      )
    if self.diversity_floor:
      floor = self.diversity_floor * base["eval/diversity"]
      if newest["eval/diversity"] < floor:
        warnings.append(
          f"the diversity is {newest['eval/diversity']:.3f}, below {floor:.3f}, which is "
          f"{self.diversity_floor:g} of the base model's"
        )
    is_best = bool(golds) and best_step == steps[-1]
    return Verdict(tuple(warnings), best_step, is_best, self.action == "stop" and bool(warnings))


def make(
  *,
  gold: str,
  patience: int,
  kl_budget: float,
  diversity_floor: float,
  action: str,
  rewards: Sequence[str],
  every: int,
  kl: bool,
  has_kl: bool,
) -> Guard | None:
  """None where the action is "off"; `rewards`, `every` and `kl` are those of the evaluation.

  `has_kl` is whether the sampler has a step with noise, without which there is no KL.
  Raises ValueError for a guard that could see nothing.
  """
  if action not in ACTIONS:
    raise ValueError(f"config.guard.action: expected one of {', '.join(ACTIONS)}; got {action!r}")
  if action == "off":
    return None
  if every < 1:
    raise ValueError(
      f"config.guard.action: {action!r} needs evaluations during the run; set "
      "config.evaluation.every above 0"
    )
  if gold and gold not in rewards:
    raise ValueError(
      f"config.guard.gold: expected one of the evaluation's rewards, {', '.join(rewards)}; got "
      f"{gold!r}"
    )
  if action == "stop" and not gold:
    raise ValueError("config.guard.gold: 'stop' keeps the best checkpoint; name what it is best on")
  if patience < 1 or kl_budget < 0 or not 0 <= diversity_floor <= 1:
    raise ValueError(
      "config.guard: expected patience of at least 1, kl_budget of at least 0 and diversity_floor "
      f"from 0 to 1; got {patience}, {kl_budget} and {diversity_floor}"
    )
  if kl_budget and not has_kl:
    raise ValueError(
      "config.guard.kl_budget: expected 0, because every step of config.process is deterministic, "
      f"and without noise there is no KL; got {kl_budget:g}\nset it to 0, or raise eta, or "
      "noise_level, above 0"
    )
  if kl_budget and not kl:
    raise ValueError(
      f"config.guard.kl_budget: {kl_budget:g} needs the KL, found evaluations that do not measure "
      "it\nset config.evaluation.kl to True, which makes them cost three times as much, or the "
      "budget to 0"
    )
  return Guard(gold, patience, kl_budget, diversity_floor, action)


class Watch:
  """A guard at work: it remembers the run's evaluations, says what it finds, keeps the best state.

  Without a guard it finds nothing and keeps nothing. Of several processes each comes to the same
  verdict, and the first one writes.
  """

  def __init__(
    self,
    guard: Guard | None,
    base: Mapping[str, float | None],
    workdir: str | os.PathLike,
    start: int,
    settings: Mapping[str, Any],
  ):
    """A new watch, or the rest of one.

    Args:
      base: the base model's evaluation.
      start: the iterations that are finished.
      settings: all that decides an evaluation's figures but the parameters.
    """
    workdir = pathlib.Path(workdir)
    self._guard, self._base, self._workdir = guard, base, workdir
    self._evaluations: list[dict[str, Any]] = []
    if guard is not None:
      if guard.diversity_floor and base.get("eval/diversity") is None:
        raise ValueError(
          "config.guard.diversity_floor: expected several samples of a record in the evaluation, "
          "found one of each\nraise config.evaluation.num_samples, or set the floor to 0"
        )
      self._best = checkpoint.Manager(workdir, every=0, keep=1, folder=checkpoint.BEST)
      self._settings = _digest({**settings, "gold": guard.gold})
      self._evaluations = self._seen_before(start)
    if kept(workdir) is not None and not self.verdict().stop:
      self._write(ended=False)  # a run that goes on has not ended

  def _seen_before(self, start: int) -> list[dict[str, Any]]:
    path = self._workdir / RECORD
    seen = files.read_json(path)["evaluations"] if path.exists() else []
    counted = [r for r in seen if r["step"] < start and r["settings"] == self._settings]
    if start and not counted:
      tqdm.tqdm.write(
        f"guard: it watches from iteration {start} on; no evaluation before was watched with the "
        "settings of this one"
      )
    return counted

  def verdict(self) -> Verdict:
    """On the run so far."""
    if self._guard is None or not self._evaluations:
      return UNWATCHED
    return self._guard.judge(self._evaluations, self._base)

  def look(self, state: TrainState, record: Mapping[str, float | None]) -> Verdict:
    """The verdict after an evaluation of `state`, whose metrics are in `record`."""
    if self._guard is None:
      return UNWATCHED
    step = int(state.step)
    values = {name: value for name, value in record.items() if name.startswith("eval/")}
    self._evaluations.append({"step": step - 1, "settings": self._settings, **values})
    verdict = self.verdict()
    for warning in verdict.warnings:
      tqdm.tqdm.write(f"guard: iteration {step}: {warning}")
    if verdict.is_best:
      self._best.save(step, state, force=True)
      self._best.wait()  # before the checkpoint after which it would not be saved again
    self._write(ended=False)
    return verdict

  def end(self, initial: TrainState) -> TrainState:
    """The state with the highest gold reward, `initial` if nothing passed the base model's.

    From then on it is what commands take of this run. Raises ValueError if the state that is kept
    is not the one that the verdict names.
    """
    step, state = self.verdict().best_step, initial
    if step:
      try:
        state = self._best.restore(step, initial)
      except ValueError as error:
        raise ValueError(
          f"guard: {error}\nremove {self._workdir / RECORD} to watch the run anew, or continue "
          "without, by --config.guard.action=off"
        ) from error
    self._write(ended=True)
    return state

  def _write(self, *, ended: bool) -> None:
    if hosts.is_first():
      content = {"ended": ended, "best_step": self.verdict().best_step}
      files.write_json(self._workdir / RECORD, {**content, "evaluations": self._evaluations})

  def close(self) -> None:
    if self._guard is not None:
      self._best.close()


def in_words(value: float | None) -> str:
  """A figure for a sentence."""
  return "without a verdict" if value is None else f"{value:.3f}"


def _digest(settings: Mapping[str, Any]) -> str:
  text = json.dumps(settings, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


UNWATCHED = Verdict((), 0, False, False)
