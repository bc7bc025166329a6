"""Whatever is wrong with a config ends in one to three lines: mistakes made at random."""

import mutated_configs
import pytest

from jaxalign.cli import configs

COUNT, FAST = 2000, 300


@pytest.fixture(scope="module")
def bases():
  return {name: configs.load(name) for name in mutated_configs.BASES}


def messages(seeds, bases, workdir):
  return [mutated_configs.try_one(seed, bases, workdir) for seed in seeds]


def test_the_configs_themselves_are_right(bases, tmp_path):
  for config in bases.values():
    assert mutated_configs.outcome(lambda c=config: mutated_configs.prepare(c, tmp_path)) == ""


@pytest.mark.parametrize(
  "seeds", [range(FAST), pytest.param(range(FAST, COUNT), marks=pytest.mark.slow)]
)
def test_a_mistake_is_a_sentence(seeds, bases, tmp_path):
  refused = [message for message in messages(seeds, bases, tmp_path) if message]
  assert len(refused) > 0.8 * len(seeds)  # the others change nothing that could be wrong
  assert len(set(refused)) > 0.5 * FAST and list(tmp_path.iterdir()) == []
