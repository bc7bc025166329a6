"""Shared by tests of model folders that are odd in one way."""

import shutil

import pytest


@pytest.fixture(scope="module")
def sound_flow(tmp_path_factory):
  """`sound_flow(kind)`: the folder of a random flow transformer of a kind, written once a file."""
  import odd_flows

  with odd_flows.written(tmp_path_factory) as write:
    yield write


@pytest.fixture
def copy_flow(sound_flow, tmp_path):
  """`copy_flow(kind)`: a copy of that, to be changed."""

  def copy(kind):
    return shutil.copytree(sound_flow(kind), tmp_path / kind)

  return copy
