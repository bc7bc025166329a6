"""What every command does before it starts."""

import os

import jaxlib.version
import pytest

from jaxalign.cli import command

EIGEN = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
OWN = "--xla_cpu_experimental_ynn_fusion_type=+reduce"
OTHER = "--xla_cpu_multi_thread_eigen=false"


@pytest.mark.parametrize("version, before, after", [
  ((0, 10, 2), None, EIGEN),
  ((0, 12, 0, 1), OTHER, f"{OTHER} {EIGEN},-reduce"),
  ((0, 11, 0), OWN, OWN),
  ((0, 13, 0), OTHER, OTHER),  # unknown flags end the process
  ((0, 13, 0), None, None),
])
def test_kernels_are_chosen_where_the_flag_is_known(version, before, after, monkeypatch):
  monkeypatch.setattr(jaxlib.version, "__version_info__", version)
  # Set first, so that what the function sets is undone too.
  monkeypatch.setenv("XLA_FLAGS", before or "")
  if before is None:
    monkeypatch.delenv("XLA_FLAGS")
  command.choose_cpu_kernels()
  assert os.environ.get("XLA_FLAGS") == after
