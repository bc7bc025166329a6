"""Held-out evaluation: fixed prompts, fixed noise, rewards that the run need not have seen."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import checks, files, pictures, processes, statistics, system
from jaxalign import features as features_lib
from jaxalign.data import prompts as prompts_lib
from jaxalign.rewards import combine
from jaxalign.types import Params

SHOWN = 24  # pairs of images in before_after.png


@dataclasses.dataclass(frozen=True)
class Scores:
  """One set of parameters on the evaluation's prompts and noise.

  images: `[N, H, W, 3]`; rewards: `{name: [N]}`; kl: `[N]`, nats of trajectory KL to the base,
    None if no step has noise, for then it is not defined.
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
    prompts: the held-out set.
    ids: `[N]`, the prompt of each image.
    rewards: all of them are reported; their weights play no part.
    features: for diversity, `[N, H, W, 3] -> [N, F]`.
    seed: of the noise.
    every: iterations between evaluations during a run; 0 evaluates at its end only.
    microbatch: images sampled and scored at once; with the seed it decides the noise.
  """

  prompts: prompts_lib.PromptSet
  ids: np.ndarray
  rewards: combine.WeightedRewards
  features: features_lib.FeatureFn
  seed: int
  every: int
  microbatch: int

  def sample(
    self, sys: system.System, params: Params, *, num_images: int
  ) -> tuple[list[prompts_lib.Record], np.ndarray, np.ndarray | None]:
    """The first `num_images` prompts, their images `[num_images, H, W, 3]` and KLs, or None."""
    records = self.prompts[self.ids[:num_images]]
    token_ids = sys.model.tokenize([record["prompt"] for record in records])
    images, kl = sys.sample_images(params, token_ids, microbatch=self.microbatch, seed=self.seed)
    return records, images, kl

  def run(self, sys: system.System, params: Params) -> Scores:
    """Samples and scores every prompt."""
    records, images, kl = self.sample(sys, params, num_images=len(self.ids))
    rewards = {reward.name: np.zeros(len(images), np.float32) for reward in self.rewards.rewards}
    # In pieces, because a reward network that fits in training must fit here.
    starts = range(0, len(images), self.microbatch)
    for start in processes.share(starts):
      piece = slice(start, start + self.microbatch)
      for name, values in self.rewards.score(images[piece], records[piece]).items():
        rewards[name][piece] = values
    rewards = {name: processes.sum_of(values) for name, values in rewards.items()}
    found = self.features(images)
    diversity = statistics.mean_pairwise_distance(found, self.ids)
    return Scores(images, rewards, kl, diversity, statistics.vendi_score(found))

  def compare_with_base(
    self,
    sys: system.System,
    params: Params,
    base: Scores | None = None,
    *,
    kl_floor: float | None = None,
  ) -> "Comparison":
    """The base model, unless its scores are at hand, and `params` on the same prompts and noise."""
    base = self.run(sys, sys.policy.params) if base is None else base
    steps = len(sys.process.noisy_steps()), sys.process.table.num_steps
    aligned = self.run(sys, params)
    return Comparison(self.prompts[self.ids], self.ids, base, aligned, steps, kl_floor)


def make_evaluation(
  *,
  source: str,
  num_images: int,
  rewards: Sequence[str],
  seed: int,
  microbatch: int,
  features: str,
  every: int = 0,
  kwargs: Sequence[Mapping[str, Any]] | None = None,
) -> Evaluation:
  """Draws `num_images` prompts from the set `source`, categories balanced.

  `features` is a name of `features.FEATURES`; `kwargs` are those of each reward, none by default.
  """
  for name, value in (("num_images", num_images), ("microbatch", microbatch)):
    if value < 1:
      raise ValueError(f"evaluation.{name}: expected at least 1, got {value}")
  checks.check_seed("evaluation.seed", seed)
  prompts = prompts_lib.load(source)
  ids = prompts.draw(np.random.default_rng(seed), num_images)
  total = combine.make_total(rewards, kwargs=kwargs)
  return Evaluation(prompts, ids, total, features_lib.get(features), seed, every, microbatch)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Base and aligned model on the same prompts and noise.

  kl_steps: how many steps of a trajectory have noise, over which alone its KL is, and all of them.
  kl_floor: what rounding alone makes the KL read, where that was measured (`precision`).
  """

  records: list[prompts_lib.Record]
  ids: np.ndarray
  base: Scores
  aligned: Scores
  kl_steps: tuple[int, int]
  kl_floor: float | None = None

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
      f"held-out: {report['num_images']} images of {report['num_prompts']} prompts, same noise",
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
    lines.append(f"{'trajectory KL':24}{'':8}{self._kl_in_words()}")
    return "\n".join(lines)

  def _kl_in_words(self) -> str:
    noisy, steps = self.kl_steps
    if self.aligned.kl_to_ref is None:
      return f"     none: not one of {steps} steps has noise"
    floor = "" if self.kl_floor is None else f"; {self.kl_floor:.2g} are rounding"
    return f"{self.aligned.kl_to_ref:9.3f} nats over {noisy} of {steps} steps{floor}"

  def write(self, workdir: pathlib.Path) -> None:
    """Writes evaluation.json and before_after.png."""
    files.write_json(workdir / "evaluation.json", self.report())
    captions = [record["prompt"] for record in self.records[:SHOWN]]
    picture = pictures.before_and_after(
      self.base.images[:SHOWN], self.aligned.images[:SHOWN], captions, columns=8
    )
    picture.save(workdir / "before_after.png")
