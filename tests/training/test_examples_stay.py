"""Examples stay on the device that holds them: the compiled updates of eight devices are read."""

import pytest
from device_jobs import printed_by


@pytest.fixture(scope="module")
def printed(compilation_cache):
  """What `update_collectives` prints, on eight devices."""
  return printed_by("update_collectives", compilation_cache)


@pytest.mark.parametrize("name", ["ddpo", "d3po", "dpo", "draft"])
def test_an_update_moves_its_gradient_and_metrics_and_no_example(printed, name):
  """Of a slice whose latents are 32 KiB, the largest that moves is a metric of all its rows."""
  moved = printed["moved"][name]
  assert "all-reduce" in {operation for operation, _ in moved}  # of the gradient
  assert {operation for operation, _ in moved} <= {"all-reduce", "all-gather"}
  assert max(size for _, size in moved) <= printed["slice"] / 128


def test_a_plain_index_would_move_whole_slices(printed):
  """So that the reader of compiled programs is known to see what it looks for."""
  assert max(size for _, size in printed["moved"]["by a plain index"]) >= printed["slice"]
