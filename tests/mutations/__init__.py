"""Deliberate bugs: each a line of the package replaced, and the test files that must notice.

A green suite says little about lines that no test watches, above all about what is handed from one
part to the next: such a mistake is the same on both sides of every comparison of a run with itself.
`test_mutations.py` makes each of these mistakes and demands that the suite fails. Whoever changes a
line here keeps its mistake up to date, and whoever writes a feed adds the mistakes it invites.
"""

from mutations.data import DATA
from mutations.feeds import FEEDS
from mutations.flows import FLOWS
from mutations.labels import LABELS
from mutations.reviewed import REVIEWED
from mutations.rewards import REWARDS
from mutations.sampling import SAMPLING
from mutations.steering import STEERING
from mutations.training import TRAINING

MUTANTS = [*REVIEWED, *FEEDS, *TRAINING, *SAMPLING, *REWARDS, *LABELS, *STEERING, *DATA, *FLOWS]

__all__ = ["MUTANTS", "REVIEWED"]
