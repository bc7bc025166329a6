"""Held-out evaluation: fixed prompts, fixed noise, rewards that the run need not have seen."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import checks, files, pictures, processes, statistics, system
from jaxalign.data import prompts as prompts_lib
from jaxalign.rewards import combine
from jaxalign.types import Params

SHOWN = 24  # pairs of images in before_after.png


@dataclasses.dataclass(frozen=True)
class Scores:
  """Rewards of one set of parameters on the evaluation's prompts and noise."""

  images: np.ndarray  # [N, H, W, 3]
  rewards: Mapping[str, np.ndarray]  # {name: [N]}

  def means(self, prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": float(values.mean()) for name, values in self.rewards.items()}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Fixed prompts, fixed noise, and the rewards to score them with.

  Attributes:
    prompts: the held-out set.
    ids: `[N]`, the prompt of each image.
    rewards: all of them are reported; their weights play no part.
    seed: of the noise.
    every: iterations between evaluations during a run; 0 evaluates at its end only.
  """

  prompts: prompts_lib.PromptSet
  ids: np.ndarray
  rewards: combine.WeightedRewards
  seed: int
  every: int

  def sample(
    self, sys: system.System, params: Params, microbatch: int, *, num_images: int
  ) -> tuple[list[prompts_lib.Record], np.ndarray]:
    """The first `num_images` prompts and their images `[num_images, H, W, 3]`."""
    records = self.prompts[self.ids[:num_images]]
    token_ids = sys.model.tokenize([record["prompt"] for record in records])
    return records, sys.sample_images(params, token_ids, microbatch=microbatch, seed=self.seed)

  def run(self, sys: system.System, params: Params, microbatch: int) -> Scores:
    """Samples and scores every prompt."""
    records, images = self.sample(sys, params, microbatch, num_images=len(self.ids))
    named = {reward.name: np.zeros(len(images), np.float32) for reward in self.rewards.rewards}
    # In pieces, because a reward network that fits in training must fit here.
    starts = range(0, len(images), microbatch)
    for start in processes.share(starts):
      piece = slice(start, start + microbatch)
      for name, values in self.rewards.score(images[piece], records[piece]).items():
        named[name][piece] = values
    return Scores(images, {name: processes.sum_of(values) for name, values in named.items()})

  def compare_with_base(
    self, sys: system.System, params: Params, microbatch: int
  ) -> "Comparison":
    """The base model and `params` on the same prompts and noise."""
    base = self.run(sys, sys.policy.params, microbatch)
    return Comparison(self.prompts[self.ids], self.ids, base, self.run(sys, params, microbatch))


def make_evaluation(
  *,
  source: str,
  num_images: int,
  rewards: Sequence[str],
  seed: int,
  every: int = 0,
  kwargs: Sequence[Mapping[str, Any]] | None = None,
) -> Evaluation:
  """Draws `num_images` prompts from the set `source`, categories balanced.

  `kwargs` are those of each reward, none by default.
  """
  if num_images < 1:
    raise ValueError(f"evaluation.num_images: expected at least 1, got {num_images}")
  checks.check_seed("evaluation.seed", seed)
  prompts = prompts_lib.load(source)
  ids = prompts.draw(np.random.default_rng(seed), num_images)
  return Evaluation(prompts, ids, combine.make_total(rewards, kwargs=kwargs), seed, every)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Base and aligned model on the same prompts and noise."""

  records: list[prompts_lib.Record]
  ids: np.ndarray
  base: Scores
  aligned: Scores

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
    return "\n".join(lines)

  def write(self, workdir: pathlib.Path) -> None:
    """Writes evaluation.json and before_after.png."""
    files.write_json(workdir / "evaluation.json", self.report())
    captions = [record["prompt"] for record in self.records[:SHOWN]]
    picture = pictures.before_and_after(
      self.base.images[:SHOWN], self.aligned.images[:SHOWN], captions, columns=8
    )
    picture.save(workdir / "before_after.png")
