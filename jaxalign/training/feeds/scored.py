"""From the rewards of an iteration to what labels see of them, and what a log says."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from jaxalign.labels.base import Scores
from jaxalign.modalities.modality import Modality
from jaxalign.rewards import scoring
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import RewardError


def scores_of(
  rewards: WeightedRewards,
  named: Mapping[str, np.ndarray],  # [P K] each, NaN where a reward abstained
  chosen: np.ndarray,  # [P], the record of each row
  nats: np.ndarray,  # [P K]
  *,
  kl_weight: float,
) -> tuple[Scores, dict[str, float | None]]:
  """Scores in rows `[P, K]`, the KL's price taken off, and metrics: of verdicts alone."""
  rows = (len(chosen), -1)
  total, valid = rewards.total(named), rewards.valid(named)
  raw = rewards.raw(named)  # as a log shows them: before any normalisation
  record = {"reward/mean": mean(raw[valid]), "reward/std": std(raw[valid])}
  record |= {f"reward/{name}": mean(values[~np.isnan(values)]) for name, values in named.items()}
  groups = raw.reshape(rows)
  if groups.shape[1] > 1:
    record["reward/flat_groups"] = float(np.mean([is_flat(group) for group in groups]))
  if rewards.host_parts:  # those on the device always have a verdict
    record["reward/abstained"] = float(scoring.abstained(dict(named)).mean())
  # After the metrics, which tell how good samples are and not what they cost.
  penalty = kl_weight * nats
  scores = Scores(
    total=(total - penalty).reshape(rows),
    named={name: values.reshape(rows) for name, values in named.items()},
    weights={name: np.float32(weight) for name, weight in rewards.weight_of.items()},
    penalty=penalty.reshape(rows),
    record=chosen,
    # Numbers of the records in this batch; `chosen` are those of the whole run.
    group=np.unique(chosen, return_inverse=True)[1].astype(np.int32),
    valid=valid.reshape(rows),
  )
  return scores, record


def mean(values: np.ndarray) -> float | None:
  """None of nothing."""
  return float(values.mean()) if values.size else None


def std(values: np.ndarray) -> float | None:
  """None of nothing."""
  return float(values.std()) if values.size else None


def is_flat(group: np.ndarray) -> bool:
  """Whether the samples `[K]` of a record teach nothing: all that have a verdict are alike."""
  known = group[~np.isnan(group)]
  return not known.size or bool(np.ptp(known) == 0)


@contextlib.contextmanager
def saving_rejected(modality: Modality, workdir: str | os.PathLike, step: int) -> Iterator[None]:
  """Saves a sample that cannot be used, and names iteration and file, before its error goes on."""
  workdir = pathlib.Path(workdir)
  try:
    yield
  except RewardError as error:
    if error.sample is None:
      raise RewardError(f"iteration {step}: {error}", index=error.index) from error
    rejected = workdir / f"rejected_step_{step:06d}"
    rejected.mkdir(exist_ok=True)
    (path,) = modality.write(np.nan_to_num(error.sample)[None], rejected)
    raise RewardError(f"iteration {step}: {error}\nits sample is in {path}") from error
