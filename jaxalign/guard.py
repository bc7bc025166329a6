"""Over-optimisation, noticed: a reward that is not trained on, a KL budget, a diversity floor.

The verdict is a function of the evaluations in `metrics.jsonl` alone, so a run that was killed
comes to the same one.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tqdm

from jaxalign import checkpoint, metrics
from jaxalign.state import TrainState

ACTIONS = ("off", "warn", "stop")


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
    best = base.get(f"eval/{self.gold}", -math.inf)
    for step, gold in zip(steps, golds, strict=False):
      since += 1
      if gold > best:
        best, best_step, since = gold, step, 0
    warnings = []
    if golds and since >= self.patience:
      warnings.append(
        f"the gold reward {self.gold} is {golds[-1]:.3f} and has not passed {best:.3f}, of "
        f"iteration {best_step}, for {since} evaluations"
      )
    if self.kl_budget and newest["eval/kl_to_ref"] > self.kl_budget:
      warnings.append(
        f"the trajectory KL to the reference is {newest['eval/kl_to_ref']:.1f} nats, above the "
        f"budget of {self.kl_budget:g}"
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
  has_kl: bool,
) -> Guard | None:
  """None where the action is "off"; `rewards` and `every` are those of the evaluation.

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
  return Guard(gold, patience, kl_budget, diversity_floor, action)


class Watch:
  """A guard at work: it remembers the run's evaluations, says what it finds, keeps the best state.

  Without a guard it finds nothing and keeps nothing. Of several processes each comes to the same
  verdict.
  """

  def __init__(
    self, guard: Guard | None, base: Mapping[str, float], workdir: pathlib.Path, start: int
  ):
    """`base` are the base model's evaluation and `start` the iterations that are finished."""
    self._guard, self._base = guard, base
    if guard is None:
      return
    if guard.diversity_floor and base.get("eval/diversity") is None:
      raise ValueError(
        "config.guard.diversity_floor: expected several images of a prompt in the evaluation, "
        "found one of each\nraise config.evaluation.num_images, or set the floor to 0"
      )
    self._best = checkpoint.Manager(workdir, every=0, keep=1, folder=checkpoint.BEST)
    self._evaluations = [
      record
      for record in (metrics.read(workdir) if start else [])
      if record["step"] < start and "eval/kl_to_ref" in record
    ]

  def verdict(self) -> Verdict:
    """On the run so far."""
    if self._guard is None or not self._evaluations:
      return UNWATCHED
    return self._guard.judge(self._evaluations, self._base)

  def look(self, state: TrainState, record: Mapping[str, float]) -> Verdict:
    """The verdict after an evaluation of `state`, whose metrics are in `record`."""
    if self._guard is None:
      return UNWATCHED
    step = int(state.step)
    self._evaluations.append({"step": step - 1, **record})
    verdict = self.verdict()
    for warning in verdict.warnings:
      tqdm.tqdm.write(f"guard: iteration {step}: {warning}")
    if verdict.is_best:
      self._best.save(step, state, force=True)
      self._best.wait()  # before the checkpoint after which it would not be saved again
    return verdict

  def best(self, initial: TrainState) -> TrainState:
    """The state with the highest gold reward; `initial` if nothing passed the base model's."""
    return self._best.restore_latest(initial)

  def close(self) -> None:
    if self._guard is not None:
      self._best.close()


UNWATCHED = Verdict((), 0, False, False)
