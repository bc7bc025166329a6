"""The gap between rollout and update: two programs that compute one log-probability.

The first update after a rollout does not depend on it, as the ratio there is 1 by construction
(`methods.ddpo`). The ratios of later updates are wrong by as much, so that it is measured in every
iteration, where the parameters are still those that sampled, and bounded. docs/exactness.md says
what was found, and where it comes from.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

GAP, SHARE = "policy/log_prob_gap", "policy/log_prob_gap_share"


class Exactness(NamedTuple):
  """The bounds of a run, in nats of a log-probability averaged over latents.

  max_log_prob_gap: of any single transition.
  tolerance: a gap that counts as none.
  max_share: of the transitions may have a larger one.
  """

  max_log_prob_gap: float
  tolerance: float
  max_share: float

  def metrics(self, gaps: np.ndarray) -> dict[str, float]:
    """The largest of the gaps of a first update, and the share of those above the tolerance."""
    return {GAP: float(np.max(gaps)), SHARE: float(np.mean(gaps > self.tolerance))}

  def problem(self, record: Mapping[str, float], step: int, transitions: int) -> str | None:
    """What to tell the user if an iteration's `metrics` exceed a bound; None if they do not."""
    gap, share = record[GAP], record[SHARE]
    if gap <= self.max_log_prob_gap and share <= self.max_share:
      return None
    return (
      f"iteration {step}: rollout and update disagree about {round(share * transitions)} of "
      f"{transitions} log-probabilities, by up to {gap:.1e} (config.exactness allows a share of "
      f"{self.max_share:g} above {self.tolerance:.0e}, and {self.max_log_prob_gap:.0e} at most)\n"
      "ratios after an iteration's first update are wrong by that much: set config.model.dtype to "
      "float32, or config.batch.updates_per_epoch and num_epochs to 1, or raise the bounds if you "
      "accept it\nthis iteration is saved; the same command continues after it"
    )


def make(*, max_log_prob_gap: float, tolerance: float, max_share: float) -> Exactness:
  """The section `exactness`; fields as in `Exactness`."""
  for name, value in (("max_log_prob_gap", max_log_prob_gap), ("tolerance", tolerance)):
    if not value >= 0.0:
      raise ValueError(f"config.exactness.{name}: expected at least 0, got {value}")
  if not 0.0 <= max_share <= 1.0:
    raise ValueError(f"config.exactness.max_share: expected 0 to 1, got {max_share}")
  return Exactness(max_log_prob_gap, tolerance, max_share)
