"""Held-out evaluation: fixed records, fixed noise, rewards that the run need not have seen.

What selects does not report. Scores during a run choose its checkpoint, and its hyper-parameters by
whoever reads them: they are of the validation records. The final comparison is of test records,
from other noise, and nothing was chosen on them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import checks, streams, system
from jaxalign.data import layouts, sources
from jaxalign.data import records as records_lib
from jaxalign.evaluation import statistics
from jaxalign.evaluation.comparison import Comparison, Scores
from jaxalign.evaluation.judging import Judge
from jaxalign.modalities import modality as modality_lib
from jaxalign.models.model import Model
from jaxalign.rewards import combine
from jaxalign.rewards.contract import Reward
from jaxalign.rewards.retry import NEVER, Retry
from jaxalign.steering import binding
from jaxalign.types import Params, Record

PARTS = ("all", "validation", "test")  # each with records and noise of its own


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Fixed records, fixed noise, and the rewards to score them with.

  Attributes:
    part: "validation", "test", or "all" of records that are not split.
    source: where the records are from, in words.
    records: the held-out set.
    ids: `[N]`, the record of each sample.
    judge: with its rewards, all of which are reported; their weights play no part.
    query: `() -> tree of [N, ...]`, what rewards on the device want to know of the records of the
      samples; made once.
    features: for diversity, a name of `Modality.features`.
    seed: of the noise.
    microbatch: samples made and scored at once; with the seed and the part it decides the noise.
    settings: all that decides the scores but the model and its sampler.
    kl: the trajectory KL of trained parameters to the base model is wanted too.
    steered: `(sys) -> sys`: with the evaluation's own sampler, if it has one.
    validation: of a test, the source of what selected before it.
  """

  part: str
  source: str
  records: records_lib.RecordSet
  ids: np.ndarray
  judge: Judge
  query: Callable[[], Any]
  features: str
  seed: int
  microbatch: int
  settings: Mapping[str, Any]
  kl: bool
  steered: Callable[[system.System], system.System]
  validation: str | None = None

  @property
  def noise(self) -> dict[str, int]:
    """Of `System.sample_all`: its seed, and a number that keeps the parts apart."""
    return {"seed": self.seed, "part": PARTS.index(self.part)}

  def check(self, model: Model) -> None:
    """Raises ValueError for records or features that the model or a reward cannot do with.

    Before a run, not after it.
    """
    try:
      model.tokenize(self.records.records)
      self.query()
    except ValueError as error:
      raise ValueError(f"config.evaluation: {self.source}: {error}") from error
    features_of(model.modality, self.features)

  def sample(
    self, sys: system.System, params: Params, *, num_samples: int, kl: bool = False, **given: Any
  ) -> tuple[list[Record], np.ndarray, np.ndarray | None]:
    """The first `num_samples` records, their samples `[num_samples, ...]` and, with `kl`, KLs.

    `given`: more of what `System.sample_all` takes.
    """
    records = self.records[self.ids[:num_samples]]
    samples, nats = self.steered(sys).sample_all(
      params, records, microbatch=self.microbatch, kl=kl, **self.noise, **given
    )
    return records, samples, nats

  def scored(
    self, sys: system.System, params: Params, *, num_samples: int, kl: bool = False
  ) -> tuple[list[Record], np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """As `sample`, and the rewards `{name: [num_samples]}`, NaN where one abstained."""
    scores = self.judge.begin(sys, self.query())
    records, samples, nats = self.sample(
      sys, params, num_samples=num_samples, kl=kl, each=scores.add
    )
    sys.model.modality.check(samples)
    return records, samples, nats, scores.finish(samples, records, self.microbatch)

  def run(self, sys: system.System, params: Params, *, kl: bool = False) -> Scores:
    """Samples and scores every record; with `kl`, says how far `params` are from the base."""
    _, samples, nats, rewards = self.scored(sys, params, num_samples=len(self.ids), kl=kl)
    found = features_of(sys.model.modality, self.features)(samples)
    diversity = statistics.mean_pairwise_distance(found, self.ids)
    return Scores(samples, rewards, nats, diversity, statistics.vendi_score(found))

  def compare_with_base(
    self,
    sys: system.System,
    params: Params,
    *,
    kl_floor: float | None = None,
  ) -> Comparison:
    """The base model and `params` on the same records and noise."""
    base = self.run(sys, sys.policy.params)
    steps = len(sys.process.noisy_steps()), sys.process.table.num_steps
    aligned = self.run(sys, params, kl=self.kl)
    sampler = self.steered(sys).sampler.report()
    return Comparison(self, sys.model, base, aligned, steps, sampler, kl_floor)


def features_of(modality: modality_lib.Modality, name: str) -> modality_lib.FeatureFn:
  """The features called `name`, or the modality's first of "default"; ValueError if unknown."""
  if name == "default":
    return next(iter(modality.features.values()))
  checks.check_choice("config.evaluation.features", name, modality.features)
  return modality.features[name]


class Evaluations(NamedTuple):
  """What a run is judged by.

  validation: during the run, where scores select; None if nothing does.
  test: at its end.
  """

  validation: Evaluation | None
  test: Evaluation

  @property
  def shown(self) -> Evaluation:
    """What pictures during the run are of."""
    return self.validation or self.test


def make_evaluations(
  *,
  source: sources.Source,
  validation: sources.Source = "",
  columns: str | layouts.Columns | None = None,
  every: int = 0,
  rewards: Sequence[str],
  kwargs: Sequence[Mapping[str, Any]] | None = None,
  sampler: Mapping[str, Any] | None = None,
  sampler_rewards: Sequence[str] = (),
  known: Sequence[Reward] = (),
  retry: Retry = NEVER,
  num_samples: int,
  seed: int,
  microbatch: int,
  features: str,
  kl: bool = False,
) -> Evaluations:
  """The evaluations of a run, from the section of its config.

  Args:
    source: the records of the test.
    validation: those of the validation, none of them in `source`. With "" and `every` above 0,
      where scores select, a third of `source` is taken for it (`records.split`); and at 0 there is
      no validation, and the end is judged on all of `source`.
    columns: of both, see `records.load`.
    every: iterations between evaluations during the run; 0 evaluates at its end only.
    rewards, kwargs, known, retry: of both, see `make_judge`.
    sampler, sampler_rewards: of both, see `make_steered`.
    num_samples, seed, microbatch, features, kl: of both, see `make_evaluation`.
  """
  judge = make_judge(rewards, kwargs=kwargs, known=known, retry=retry)
  settings = {
    **{"num_samples": num_samples, "seed": seed, "microbatch": microbatch},
    **{"features": features, "kl": kl, "judge": judge, "rewards": rewards, "kwargs": kwargs},
    **_of_sampler(sampler, sampler_rewards, judge),
  }
  records, name = records_lib.load(source, columns), sources.shown(source)
  if validation:
    apart = records_lib.load(validation, columns)
    names = sources.shown(validation), name
    _check_apart(names[0], apart, name, records)
  elif every > 0:
    apart, records = records_lib.split(records)
    names = f"a third of {name}", f"two thirds of {name}"
  else:
    return Evaluations(None, _make("all", name, records, **settings))
  first = _make("validation", names[0], apart, **settings)
  test = _make("test", names[1], records, validation=names[0], **settings)
  return Evaluations(first, test)


def _check_apart(
  validation: str, first: records_lib.RecordSet, source: str, second: records_lib.RecordSet
) -> None:
  """Raises ValueError if a record is on both sides."""
  there = {records_lib.identity(record) for record in first.records}
  both = [record for record in second.records if records_lib.identity(record) in there]
  if both:
    raise ValueError(
      f"config.evaluation.validation: expected other records than those of source, {source}; found "
      f"{len(both)} of them in {validation}, such as {dict(both[0])}\n"
      'name a file without them, or "" to take a third of source'
    )


def make_judge(
  rewards: Sequence[str],
  *,
  kwargs: Sequence[Mapping[str, Any]] | None = None,
  known: Sequence[Reward] = (),
  retry: Retry = NEVER,
) -> Judge:
  """The judge of an evaluation.

  Args:
    rewards: names, with their `kwargs`, none by default.
    known: rewards of the run, which share their parameters with those that are the same.
    retry: of rewards on the host that raise.
  """
  return Judge(combine.make_total(rewards, kwargs=kwargs, known=known), retry)


def make_steered(
  sampler: Mapping[str, Any] | None, rewards: Sequence[str], judge: Judge | None = None
) -> Callable[[system.System], system.System]:
  """`(sys) -> sys`: the system sampled as an evaluation wants it, made once for each.

  Args:
    sampler: a section `sampler`, see `steering.make`; None leaves the system's own.
    rewards: names of what it ranks by, which are added; they run on the device.
    judge: whose rewards share their parameters with those that are the same; None has none.

  Raises ValueError for rewards without a sampler, or that a program cannot score.
  """
  if sampler is None:
    if rewards:
      raise ValueError(
        f"config.evaluation.sampler_rewards: expected config.evaluation.sampler with it, got "
        f"{', '.join(rewards)} alone"
      )
    return lambda sys: sys
  if rewards:
    binding.on_device(combine.make_total(rewards, shapes_only=True))

  def steered(sys: system.System) -> system.System:
    known = judge.placed(sys.mesh).rewards if judge is not None else ()
    total = combine.make_total(rewards, known=known) if rewards else None
    return sys.with_sampler(sampler, total)

  return functools.cache(steered)


def _of_sampler(
  sampler: Mapping[str, Any] | None, rewards: Sequence[str], judge: Judge
) -> dict[str, Any]:
  """Settings of `_make`: what was asked for, and the function that does it."""
  return {
    "sampler": None if sampler is None else {**sampler, "rewards": list(rewards)},
    "steered": make_steered(sampler, rewards, judge),
  }


def make_evaluation(
  *,
  source: sources.Source,
  columns: str | layouts.Columns | None = None,
  rewards: Sequence[str],
  kwargs: Sequence[Mapping[str, Any]] | None = None,
  sampler: Mapping[str, Any] | None = None,
  sampler_rewards: Sequence[str] = (),
  num_samples: int,
  seed: int,
  microbatch: int,
  features: str,
  kl: bool = False,
) -> Evaluation:
  """An evaluation on all records of the set `source`.

  Args:
    source, columns: as in `records.load`.
    rewards, kwargs: see `make_judge`.
    sampler, sampler_rewards: see `make_steered`.
    num_samples: drawn from the records with categories balanced.
    seed: of records and noise.
    microbatch: samples made and scored at once.
    features: a name of `Modality.features`, or "default".
    kl: as in `Evaluation`.
  """
  judge = make_judge(rewards, kwargs=kwargs)
  settings = {
    **{"num_samples": num_samples, "seed": seed, "microbatch": microbatch},
    **{"features": features, "kl": kl, "judge": judge, "rewards": rewards, "kwargs": kwargs},
    **_of_sampler(sampler, sampler_rewards, judge),
  }
  return _make("all", sources.shown(source), records_lib.load(source, columns), **settings)


def _make(
  part: str,
  source: str,
  records: records_lib.RecordSet,
  *,
  num_samples: int,
  judge: Judge,
  rewards: Sequence[str],
  kwargs: Sequence[Mapping[str, Any]] | None,
  seed: int,
  microbatch: int,
  features: str,
  sampler: Mapping[str, Any] | None,
  steered: Callable[[system.System], system.System],
  kl: bool = False,
  validation: str | None = None,
) -> Evaluation:
  for name, value in (("num_samples", num_samples), ("microbatch", microbatch)):
    if value < 1:
      raise ValueError(f"evaluation.{name}: expected at least 1, got {value}")
  checks.check_seed("evaluation.seed", seed)
  ids = records.draw(streams.generator(seed, "evaluation records", PARTS.index(part)), num_samples)
  settings = {
    "part": part,
    "records": [dict(record) for record in records[ids]],
    "rewards": rewards,
    "kwargs": kwargs,
    "seed": seed,
    "microbatch": microbatch,
    "features": features,
    "kl": kl,
    **({} if sampler is None else {"sampler": sampler}),
  }
  return Evaluation(
    part=part,
    source=source,
    records=records,
    ids=ids,
    judge=judge,
    query=functools.cache(lambda: judge.rewards.encode(records[ids])),
    features=features,
    seed=seed,
    microbatch=microbatch,
    settings=settings,
    kl=kl,
    steered=steered,
    validation=validation,
  )
