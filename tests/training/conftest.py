"""Feeds on the system of `toy_feed`."""

import contextlib
import json
import types

import pytest
from toy_feed import BATCH, BY_NUMBER, SEED, Stub, by_advantage

from jaxalign.training.feeds import online


@pytest.fixture
def stub():
  return Stub()


@pytest.fixture
def make_feed(stub, tmp_path):
  """Record i of four is of value 10 i + 5, and is known by it."""
  with contextlib.ExitStack() as opened:

    def make(data=None, rewards=BY_NUMBER, records=4, copies=(), **changes):
      lines = [json.dumps({"prompt": "x", "value": 10 * i + 5}) for i in range(records)]
      (tmp_path / "records.jsonl").write_text("\n".join(lines))
      batch = {**BATCH, **changes.pop("batch", {})}
      sections = {
        "seed": SEED,
        "data": {"source": str(tmp_path / "records.jsonl")},
        "batch": {name: value for name, value in batch.items() if value is not None},
        "reward_pool": {"num_threads": 1},
        "exactness": {"max_log_prob_gap": 0.5, "tolerance": 0.1, "max_share": 0.25},
        **changes,
      }
      setup = types.SimpleNamespace(
        sections=sections, system=stub, rewards=rewards, copies=dict.fromkeys(copies)
      )
      return opened.enter_context(online.Online(setup, data or by_advantage(), tmp_path))

    yield make
