"""What a mistake is, and the test files that notice most of them."""

from typing import NamedTuple


class Mutant(NamedTuple):
  """A mistake.

  name: what goes wrong.
  file: under `jaxalign/`.
  old: exact text that occurs once in it.
  new: what stands there instead.
  tests: test files, under `tests/`, that have to fail; the cheapest that do.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]

  def apply(self, text: str) -> str:
    """The file's text with the mistake in it; ValueError unless it has one place for it."""
    if (count := text.count(self.old)) != 1:
      raise ValueError(f"{self.name}: expected its text once in {self.file}, found {count} times")
    return text.replace(self.old, self.new)


ONLINE = ("training/test_online_feed.py",)
ONLINE_LABELS = ("training/test_online_labels.py",)
ONLINE_REWARDS = ("training/test_online_rewards.py",)
RECORDS = ("training/test_records_feed.py",)
STORED = ("training/test_stored_feed.py",)
UPDATE = ("training/test_update.py",)
SYSTEM = ("test_system.py",)
AVERAGE = ("test_average.py",)
LOOP = ("test_loop.py",)
GUARD = ("training/test_guard.py",)
EVALUATION = ("evaluation/test_evaluation.py",)
SCORING = ("rewards/test_scoring.py",)
POOL = ("rewards/test_reward_pool.py",)
TIME = ("rewards/test_time.py",)
ABSTENTION = ("labels/test_abstention.py",)
BEST_OF_N = ("steering/test_best_of_n.py",)
