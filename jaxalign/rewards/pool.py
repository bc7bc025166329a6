"""Scores samples on host threads while the device goes on with the next rollout."""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from jaxalign.modalities.modality import SampleError
from jaxalign.rewards import retry
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import Record, RewardError
from jaxalign.types import Array


class RewardPool:
  """Rewards that have no form on the device: `submit` each microbatch, then `gather` the iteration.

    with RewardPool(total, modality.check, num_threads=2) as pool:
      pending = [pool.submit(decode(rollout(...)), records) for records in microbatches]
      named = pool.gather(pending)

  `submit` returns at once even when the samples are still being computed: a worker waits for them
  and copies them to the host. They must not be donated meanwhile. Rewards are called from
  `num_threads` threads at once; take 1 for a reward that cannot bear that. `check` refuses samples
  that must not be scored, see `Modality.check`. A reward that raises is asked again `num_retries`
  times, after `retry_seconds` and then twice as long each time; what it returns is final.
  """

  def __init__(
    self,
    total: WeightedRewards,
    check: Callable[[np.ndarray], None],
    num_threads: int,
    num_retries: int = 0,
    retry_seconds: float = 1.0,
  ):
    if num_threads < 1:
      raise ValueError(f"config.reward_pool.num_threads: expected at least 1, got {num_threads}")
    self._total, self._check = total, check
    self._closing = threading.Event()  # ends the wait for another attempt
    self._retry = retry.make(
      num_retries=num_retries, retry_seconds=retry_seconds, wait=self._closing.wait
    )
    self._executor = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="reward")

  def submit(
    self,
    samples: Array,  # [b, ...]
    records: Sequence[Record],
  ) -> futures.Future[dict[str, np.ndarray]]:
    """The future of the raw rewards `{name: [b]}`; an error in a reward comes out of `result`.

    NaN where a reward abstained.
    """
    return self._executor.submit(self._score, samples, records)

  def gather(
    self, pending: Sequence[futures.Future[dict[str, np.ndarray]]]
  ) -> dict[str, np.ndarray]:
    """`{name: [B]}` over all microbatches, in the order of `pending`."""
    parts = [future.result() for future in pending]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def close(self) -> None:
    """Drops what has not started and waits for what has."""
    self._closing.set()
    self._executor.shutdown(wait=True, cancel_futures=True)

  def __enter__(self) -> "RewardPool":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _score(self, samples: Array, records: Sequence[Record]) -> dict[str, np.ndarray]:
    held = np.asarray(samples, np.float32)
    check_samples(self._check, held)
    return self._total.on_host(held, records, self._retry)


def check_samples(check: Callable[[np.ndarray], None], held: np.ndarray) -> None:
  """`check(held)`, whose SampleError becomes a RewardError that comes with its sample."""
  try:
    check(held)
  except SampleError as error:
    raised = RewardError(str(error), index=error.index)
    raised.sample = None if error.index is None else held[error.index]
    raise raised from error
