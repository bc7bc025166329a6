"""Scores samples on host threads while the device goes on with the next rollout."""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import numpy as np

from jaxalign.modalities.modality import SampleError
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import Record, RewardError
from jaxalign.types import Array

# {name: [b]} of what this process scored -> {name: [B]} of what all processes did
Exchange = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class RewardPool:
  """`submit` each microbatch as it is decoded, then `gather` the iteration.

    with RewardPool(total, modality.check, num_threads=2) as pool:
      pending = [pool.submit(decode(rollout(...)), records) for records in microbatches]
      rewards, named = pool.gather(pending)

  `submit` returns at once even when the samples are still being computed: a worker waits for them
  and copies them to the host. They must not be donated meanwhile. Rewards are called from
  `num_threads` threads at once; take 1 for a reward that cannot bear that. `check` refuses samples
  that must not be scored, see `Modality.check`.
  """

  def __init__(
    self, total: WeightedRewards, check: Callable[[np.ndarray], None], num_threads: int
  ):
    if num_threads < 1:
      raise ValueError(f"config.reward_pool.num_threads: expected at least 1, got {num_threads}")
    self._total, self._check = total, check
    self._executor = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="reward")

  def submit(
    self,
    samples: Array,  # [b, ...]
    records: Sequence[Record],
  ) -> futures.Future[dict[str, np.ndarray]]:
    """The future of the raw rewards `{name: [b]}`; an error in a reward comes out of `result`."""
    return self._executor.submit(self._score, samples, records)

  def gather(
    self, pending: Sequence[futures.Future[dict[str, np.ndarray]]], exchange: Exchange = dict
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`(total [B], {name: [B]})` over all microbatches, in the order of `pending`."""
    parts = [future.result() for future in pending]
    named = exchange({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return self._total.total(named), named

  def close(self) -> None:
    """Drops what has not started and waits for what has."""
    self._executor.shutdown(wait=True, cancel_futures=True)

  def __enter__(self) -> "RewardPool":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _score(self, samples: Array, records: Sequence[Record]) -> dict[str, np.ndarray]:
    held = np.asarray(samples, np.float32)
    try:
      self._check(held)
    except SampleError as error:
      raised = RewardError(str(error), index=error.index)
      raised.sample = None if error.index is None else held[error.index]
      raise raised from error
    return self._total.score(held, records)
