"""Another attempt after a failure, with exponential backoff: for rewards that ask a server."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tqdm

from jaxalign.checks import in_one_line
from jaxalign.checks.own_code import FAILURES
from jaxalign.rewards.contract import RewardError, failed


class Retry(NamedTuple):
  """How often a reward on the host is asked again after an exception.

  num_retries: attempts after the first one.
  seconds: before the first of them; every later wait is twice as long.
  wait: `(seconds) -> truth`: waits, and says whether to give up, as a pool that closes does.
  """

  num_retries: int = 0
  seconds: float = 1.0
  wait: Callable[[float], Any] = time.sleep

  def call(self, name: str, function: Callable[[], Any]) -> Any:
    """`function()`, again where it raises; RewardError names the reward after the last attempt.

    A RewardError is about what the reward has returned, which another attempt would not change.
    """
    attempts = self.num_retries + 1
    for attempt in range(attempts):
      try:
        return function()
      except RewardError:
        raise
      except FAILURES as error:  # the user's code may raise anything
        pause = self.seconds * 2.0**attempt
        if attempt + 1 < attempts:
          said = f'reward "{name}": attempt {attempt + 1} of {attempts} failed'
          reason = in_one_line(error)
          tqdm.tqdm.write(f"{said}: {reason}; again in {pause:g} s", file=sys.stderr)
        if attempt + 1 == attempts or self.wait(pause):
          times = f" {attempt + 1} times, at last by" if attempt else ""
          raise RewardError(failed(name, error, times)) from error


NEVER = Retry()


def of_section(section: Mapping[str, Any]) -> Retry:
  """As a section `reward_pool` asks for, for whoever scores without a pool."""
  fields = ("num_retries", "retry_seconds")
  return make(**{name: section[name] for name in fields if name in section})


def make(
  *, num_retries: int = 0, retry_seconds: float = 1.0, wait: Callable[[float], Any] = time.sleep
) -> Retry:
  """From the fields of the section `reward_pool`; ValueError for numbers that make no sense."""
  if isinstance(num_retries, bool) or not isinstance(num_retries, int) or num_retries < 0:
    raise ValueError(
      f"config.reward_pool.num_retries: expected a whole number of at least 0, got {num_retries!r}"
    )
  if not (math.isfinite(retry_seconds) and retry_seconds >= 0):
    raise ValueError(
      f"config.reward_pool.retry_seconds: expected at least 0, got {retry_seconds!r}"
    )
  return Retry(num_retries, float(retry_seconds), wait)
