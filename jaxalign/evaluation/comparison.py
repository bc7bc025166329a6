"""What an evaluation found, and a base model beside an aligned one: report, table, picture."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign import files, steering
from jaxalign.evaluation import statistics
from jaxalign.modalities import modality as modality_lib
from jaxalign.models.model import Model
from jaxalign.types import Record

if TYPE_CHECKING:
  from jaxalign.evaluation.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class Scores:
  """One set of parameters on the evaluation's records and noise.

  samples: `[N, ...]`; rewards: `{name: [N]}`, NaN where one has no verdict; kl: `[N]`, nats of
    trajectory KL to the base, or None where it was not asked for, or no step has noise and it is
    not defined.
  diversity: mean pairwise distance of the samples of a record, None if no record has two; vendi:
    of all samples.
  """

  samples: np.ndarray
  rewards: Mapping[str, np.ndarray]
  kl: np.ndarray | None
  diversity: float | None
  vendi: float

  @property
  def kl_to_ref(self) -> float | None:
    """The mean KL."""
    return None if self.kl is None else float(self.kl.mean())

  @property
  def abstained(self) -> dict[str, int]:
    """By name, the samples on which a reward has no verdict."""
    return {name: int(np.isnan(values).sum()) for name, values in self.rewards.items()}

  def means(self, prefix: str) -> dict[str, float | None]:
    """By name, of rewards over their verdicts; None for what is not defined."""
    values: dict[str, float | None] = {
      name: statistics.mean(values) for name, values in self.rewards.items()
    }
    values |= {"kl_to_ref": self.kl_to_ref, "vendi": self.vendi, "diversity": self.diversity}
    return {f"{prefix}{name}": value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Base and aligned model on the same records and noise.

  evaluation: whose records and noise these are.
  model: what was sampled.
  kl_steps: how many steps of a trajectory have noise, over which alone its KL is, and all of them.
  sampler: what both were sampled by, a `Sampler.report`.
  kl_floor: what rounding alone makes the KL read, where that was measured (`precision`).
  """

  evaluation: "Evaluation"
  model: Model
  base: Scores
  aligned: Scores
  kl_steps: tuple[int, int]
  sampler: Mapping[str, Any]
  kl_floor: float | None = None

  @property
  def ids(self) -> np.ndarray:
    return self.evaluation.ids

  @property
  def records(self) -> list[Record]:
    return self.evaluation.records[self.ids]

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
      "num_samples": len(self.ids),
      "num_records": len(np.unique(self.ids)),
      "sampler": dict(self.sampler),
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
      f"{report['part']}: {report['num_samples']} {self.model.modality.unit} of "
      f"{report['num_records']} records of "
      f"{report['source']}, same noise",
      *self._validation_in_words(),
      *self._sampler_in_words(),
      f"{'':24}{'base':>8}{'aligned':>9}{'gain':>8}  95 % interval      wins",
    ]
    for name, row in report["rewards"].items():
      interval = row["interval_95"]
      shown = "[{:+.3f}, {:+.3f}]".format(*interval) if interval else "none: one record"
      figures = _figures(row["base"], row["aligned"])
      if row["difference"] is None:
        lines.append(f"{name:24}{figures}    none: no sample has both verdicts")
      else:
        difference, wins = f"{row['difference']:+8.3f}", f"{row['win_rate']:6.1%}"
        lines.append(f"{name:24}{figures}{difference}  {shown}  {wins}")
      if any(row["abstained"].values()):
        counts = "{base} (base) and {aligned} (aligned)".format(**row["abstained"])
        lines.append(f"  no verdict on {counts} of {report['num_samples']}")
      for category, means in row.get("categories", {}).items():
        lines.append(f"  {category:22}{_figures(means['base'], means['aligned'])}")
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

  def _sampler_in_words(self) -> list[str]:
    return [] if self.sampler["name"] == "chain" else [f"  {steering.in_words(self.sampler)}"]

  def _kl_in_words(self) -> list[str]:
    noisy, steps = self.kl_steps
    name, kl = f"{'trajectory KL':24}", self.aligned.kl_to_ref
    if noisy == 0:
      return [f"{name}{'':13}none: not one of {steps} steps has noise"]
    if kl is None and self.evaluation.kl:
      return [f"{name}{'':13}none: {self.sampler['name']} keeps no trajectory"]
    if kl is None:  # it was not asked for
      return []
    floor = "" if self.kl_floor is None else f"; {self.kl_floor:.2g} are rounding"
    return [f"{name}{'':8}{kl:9.3f} nats over {noisy} of {steps} steps{floor}"]

  def write(self, workdir: str | os.PathLike) -> None:
    """Writes evaluation.json and before_after.png."""
    workdir = pathlib.Path(workdir)
    files.write_json(workdir / "evaluation.json", self.report())
    modality = self.model.modality
    captions = [self.model.describe(record) for record in self.records[: modality.shown]]
    before, after = (scores.samples[: modality.shown] for scores in (self.base, self.aligned))
    picture = modality_lib.before_and_after(modality, before, after, captions, 8)
    picture.save(workdir / "before_after.png")


def _figures(base: float | None, aligned: float | None) -> str:
  """Two columns of the table."""
  shown = ["none" if value is None else f"{value:.3f}" for value in (base, aligned)]
  return f"{shown[0]:>8}{shown[1]:>9}"
