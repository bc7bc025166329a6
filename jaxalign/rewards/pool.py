"""Scores images on host threads while the device goes on with the next rollout."""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import numpy as np

from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import Prompt
from jaxalign.types import Array

# {name: [b]} of what this process scored -> {name: [B]} of what all processes did
Exchange = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class RewardPool:
  """`submit` each microbatch as it is decoded, then `gather` the iteration.

    with RewardPool(total, num_threads=2) as pool:
      pending = [pool.submit(decode(rollout(...)), prompts) for prompts in microbatches]
      rewards, named = pool.gather(pending)

  `submit` returns at once even when the images are still being computed: a worker waits for them
  and copies them to the host. They must not be donated meanwhile. Rewards are called from
  `num_threads` threads at once; take 1 for a reward that cannot bear that.
  """

  def __init__(self, total: WeightedRewards, num_threads: int):
    if num_threads < 1:
      raise ValueError(f"config.reward_pool.num_threads: expected at least 1, got {num_threads}")
    self._total = total
    self._executor = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="reward")

  def submit(
    self,
    images: Array,  # [b, H, W, 3] in [0, 1]
    prompts: Sequence[Prompt],
  ) -> futures.Future[dict[str, np.ndarray]]:
    """The future of the raw rewards `{name: [b]}`; an error in a reward comes out of `result`."""
    return self._executor.submit(self._score, images, prompts)

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

  def _score(self, images: Array, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    return self._total.score(np.asarray(images, np.float32), prompts)
