"""Held-out evaluation: fixed prompts, fixed noise, rewards that the run need not have seen.

What selects does not report. Scores during a run choose its checkpoint, and its hyper-parameters by
whoever reads them: they are of the validation prompts. The final comparison is of test prompts,
from other noise, and nothing was chosen on them.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import checks, files, streams, system
from jaxalign.data import prompts as prompts_lib
from jaxalign.distributed import hosts
from jaxalign.evaluation import statistics
from jaxalign.modalities import features as features_lib
from jaxalign.modalities import pictures
from jaxalign.rewards import combine
from jaxalign.types import Params

SHOWN = 24  # pairs of images in before_after.png
PARTS = ("all", "validation", "test")  # each with prompts and noise of its own


@dataclasses.dataclass(frozen=True)
class Scores:
  """One set of parameters on the evaluation's prompts and noise.

  images: `[N, H, W, 3]`; rewards: `{name: [N]}`; kl: `[N]`, nats of trajectory KL to the base, or
    None where it was not asked for, or no step has noise and it is not defined.
  diversity: mean pairwise distance of the images of a prompt, None if no prompt has two; vendi: of
    all images.
  """

  images: np.ndarray
  rewards: Mapping[str, np.ndarray]
  kl: np.ndarray | None
  diversity: float | None
  vendi: float

  @property
  def kl_to_ref(self) -> float | None:
    """The mean KL."""
    return None if self.kl is None else float(self.kl.mean())

  def means(self, prefix: str) -> dict[str, float | None]:
    """By name; None for what is not defined."""
    values = {name: float(values.mean()) for name, values in self.rewards.items()}
    values |= {"kl_to_ref": self.kl_to_ref, "vendi": self.vendi, "diversity": self.diversity}
    return {f"{prefix}{name}": value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Fixed prompts, fixed noise, and the rewards to score them with.

  Attributes:
    part: "validation", "test", or "all" of prompts that are not split.
    source: where the prompts are from, in words.
    prompts: the held-out set.
    ids: `[N]`, the prompt of each image.
    rewards: all of them are reported; their weights play no part.
    features: for diversity, `[N, H, W, 3] -> [N, F]`.
    seed: of the noise.
    microbatch: images sampled and scored at once; with the seed and the part it decides the noise.
    settings: all that decides the scores but the model and its sampler.
    kl: the trajectory KL of trained parameters to the base model is wanted too.
    validation: of a test, the source of what selected before it.
  """

  part: str
  source: str
  prompts: prompts_lib.PromptSet
  ids: np.ndarray
  rewards: combine.WeightedRewards
  features: features_lib.FeatureFn
  seed: int
  microbatch: int
  settings: Mapping[str, Any]
  kl: bool
  validation: str | None = None

  @property
  def noise(self) -> dict[str, int]:
    """Of `System.sample_images`: its seed, and a number that keeps the parts apart."""
    return {"seed": self.seed, "part": PARTS.index(self.part)}

  def sample(
    self, sys: system.System, params: Params, *, num_images: int, kl: bool = False
  ) -> tuple[list[prompts_lib.Record], np.ndarray, np.ndarray | None]:
    """The first `num_images` prompts, their images `[num_images, H, W, 3]` and, with `kl`, KLs."""
    records = self.prompts[self.ids[:num_images]]
    token_ids = sys.model.tokenize([record["prompt"] for record in records])
    images, nats = sys.sample_images(
      params, token_ids, microbatch=self.microbatch, kl=kl, **self.noise
    )
    return records, images, nats

  def run(self, sys: system.System, params: Params, *, kl: bool = False) -> Scores:
    """Samples and scores every prompt; with `kl`, says how far `params` are from the base."""
    records, images, nats = self.sample(sys, params, num_images=len(self.ids), kl=kl)
    rewards = {reward.name: np.zeros(len(images), np.float32) for reward in self.rewards.rewards}
    # In pieces, because a reward network that fits in training must fit here.
    starts = range(0, len(images), self.microbatch)
    for start in hosts.share(starts):
      piece = slice(start, start + self.microbatch)
      for name, values in self.rewards.score(images[piece], records[piece]).items():
        rewards[name][piece] = values
    rewards = {name: hosts.sum_of(values) for name, values in rewards.items()}
    found = self.features(images)
    diversity = statistics.mean_pairwise_distance(found, self.ids)
    return Scores(images, rewards, nats, diversity, statistics.vendi_score(found))

  def compare_with_base(
    self,
    sys: system.System,
    params: Params,
    *,
    kl_floor: float | None = None,
  ) -> "Comparison":
    """The base model and `params` on the same prompts and noise."""
    base = self.run(sys, sys.policy.params)
    steps = len(sys.process.noisy_steps()), sys.process.table.num_steps
    aligned = self.run(sys, params, kl=self.kl)
    return Comparison(self, base, aligned, steps, kl_floor)


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
  *, source: str, validation: str = "", every: int = 0, **settings: Any
) -> Evaluations:
  """The evaluations of a run, from the section of its config.

  Args:
    source: the prompts of the test.
    validation: those of the validation, none of them in `source`. With "" and `every` above 0,
      where scores select, a third of `source` is taken for it (`prompts.split`); and at 0 there is
      no validation, and the end is judged on all of `source`.
    every: iterations between evaluations during the run; 0 evaluates at its end only.
    **settings: of both, see `make_evaluation`.
  """
  prompts = prompts_lib.load(source)
  if validation:
    apart = prompts_lib.load(validation)
    _check_apart(validation, apart, source, prompts)
    names = validation, source
  elif every > 0:
    apart, prompts = prompts_lib.split(prompts)
    names = f"a third of {source}", f"two thirds of {source}"
  else:
    return Evaluations(None, _make("all", source, prompts, **settings))
  first = _make("validation", names[0], apart, **settings)
  test = _make("test", names[1], prompts, validation=names[0], **settings)
  return Evaluations(first, test)


def _check_apart(
  validation: str, first: prompts_lib.PromptSet, source: str, second: prompts_lib.PromptSet
) -> None:
  """Raises ValueError if a prompt is on both sides."""
  texts = {record["prompt"] for record in first.records}
  both = [record["prompt"] for record in second.records if record["prompt"] in texts]
  if both:
    raise ValueError(
      f"config.evaluation.validation: expected other prompts than those of source, {source}; found "
      f"{len(both)} of them in {validation}, such as {both[0]!r}\n"
      'name a file without them, or "" to take a third of source'
    )


def make_evaluation(*, source: str, **settings: Any) -> Evaluation:
  """An evaluation on all prompts of the set `source`.

  Args:
    source: as in `prompts.load`.
    **settings: `num_images`, drawn from the prompts with categories balanced; the names of
      `rewards`, and their `kwargs`, none by default; `seed`, of prompts and noise; `microbatch`;
      and `features`, a name of `features.FEATURES`.
  """
  return _make("all", source, prompts_lib.load(source), **settings)


def _make(
  part: str,
  source: str,
  prompts: prompts_lib.PromptSet,
  *,
  num_images: int,
  rewards: Sequence[str],
  seed: int,
  microbatch: int,
  features: str,
  kl: bool = False,
  kwargs: Sequence[Mapping[str, Any]] | None = None,
  validation: str | None = None,
) -> Evaluation:
  for name, value in (("num_images", num_images), ("microbatch", microbatch)):
    if value < 1:
      raise ValueError(f"evaluation.{name}: expected at least 1, got {value}")
  checks.check_seed("evaluation.seed", seed)
  ids = prompts.draw(
    streams.generator(seed, "evaluation prompts", PARTS.index(part)), num_images
  )
  settings = {
    "part": part,
    "prompts": [record["prompt"] for record in prompts[ids]],
    "rewards": rewards,
    "kwargs": kwargs,
    "seed": seed,
    "microbatch": microbatch,
    "features": features,
    "kl": kl,
  }
  return Evaluation(
    part=part,
    source=source,
    prompts=prompts,
    ids=ids,
    rewards=combine.make_total(rewards, kwargs=kwargs),
    features=features_lib.get(features),
    seed=seed,
    microbatch=microbatch,
    settings=settings,
    kl=kl,
    validation=validation,
  )


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Base and aligned model on the same prompts and noise.

  evaluation: whose prompts and noise these are.
  kl_steps: how many steps of a trajectory have noise, over which alone its KL is, and all of them.
  kl_floor: what rounding alone makes the KL read, where that was measured (`precision`).
  """

  evaluation: Evaluation
  base: Scores
  aligned: Scores
  kl_steps: tuple[int, int]
  kl_floor: float | None = None

  @property
  def ids(self) -> np.ndarray:
    return self.evaluation.ids

  @property
  def records(self) -> list[prompts_lib.Record]:
    return self.evaluation.prompts[self.ids]

  def report(self) -> dict[str, Any]:
    """What evaluation.json holds."""
    categories = [record.get("category", "") for record in self.records]
    rewards = {}
    for name, before in self.base.rewards.items():
      after = self.aligned.rewards[name]
      rewards[name] = statistics.compare(before, after, self.ids)
      if any(categories):
        before_by = statistics.by_category(before, categories)
        after_by = statistics.by_category(after, categories)
        rewards[name]["categories"] = {
          category: {"base": before_by[category], "aligned": after_by[category]}
          for category in before_by
        }
    return {
      "part": self.evaluation.part,
      "source": self.evaluation.source,
      "validation": self.evaluation.validation,
      "num_images": len(self.ids),
      "num_prompts": len(np.unique(self.ids)),
      "rewards": rewards,
      "kl_to_ref": self.aligned.kl_to_ref,
      "kl_steps": list(self.kl_steps),
      "kl_floor": self.kl_floor,
      "diversity": {"base": self.base.diversity, "aligned": self.aligned.diversity},
      "vendi": {"base": self.base.vendi, "aligned": self.aligned.vendi},
    }

  def table(self) -> str:
    """The report as text of a few lines."""
    report = self.report()
    lines = [
      f"{report['part']}: {report['num_images']} images of {report['num_prompts']} prompts of "
      f"{report['source']}, same noise",
      *self._validation_in_words(),
      f"{'':24}{'base':>8}{'aligned':>9}{'gain':>8}  95 % interval      wins",
    ]
    for name, row in report["rewards"].items():
      interval = row["interval_95"]
      shown = "[{:+.3f}, {:+.3f}]".format(*interval) if interval else "none: one prompt"
      lines.append(
        f"{name:24}{row['base']:8.3f}{row['aligned']:9.3f}{row['difference']:+8.3f}"
        f"  {shown}  {row['win_rate']:6.1%}"
      )
      for category, means in row.get("categories", {}).items():
        lines.append(f"  {category:22}{means['base']:8.3f}{means['aligned']:9.3f}")
    for name in ("diversity", "vendi"):
      row = report[name]
      if None in row.values():
        continue
      lines.append(
        f"{name:24}{row['base']:8.3f}{row['aligned']:9.3f}{row['aligned'] - row['base']:+8.3f}"
      )
    lines += self._kl_in_words()
    return "\n".join(lines)

  def _validation_in_words(self) -> list[str]:
    validation = self.evaluation.validation
    return [f"  apart from the validation during the run, {validation}"] if validation else []

  def _kl_in_words(self) -> list[str]:
    noisy, steps = self.kl_steps
    name, kl = f"{'trajectory KL':24}", self.aligned.kl_to_ref
    if noisy == 0:
      return [f"{name}{'':13}none: not one of {steps} steps has noise"]
    if kl is None:  # it was not asked for
      return []
    floor = "" if self.kl_floor is None else f"; {self.kl_floor:.2g} are rounding"
    return [f"{name}{'':8}{kl:9.3f} nats over {noisy} of {steps} steps{floor}"]

  def write(self, workdir: pathlib.Path) -> None:
    """Writes evaluation.json and before_after.png."""
    files.write_json(workdir / "evaluation.json", self.report())
    captions = [record["prompt"] for record in self.records[:SHOWN]]
    picture = pictures.before_and_after(
      self.base.images[:SHOWN], self.aligned.images[:SHOWN], captions, columns=8
    )
    picture.save(workdir / "before_after.png")
