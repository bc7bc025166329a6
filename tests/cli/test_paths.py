"""Paths of users: ~ and relative ones become absolute where they come in, and nothing else does."""

import json

import pytest
from absl import flags
from ml_collections import config_dict

from jaxalign.cli import paths


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A working directory and a home folder."""
  for name in ("home/base", "work/models/base", "work/shapes/test"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "work" / "prompts.txt").write_text("a cross\n")
  monkeypatch.chdir(tmp_path / "work")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return tmp_path


@pytest.mark.parametrize("value, expected", [
  ("~/base", "home/base"),
  ("~/not/there", "home/not/there"),
  ("models/base", "work/models/base"),
  ("./not/there", "work/not/there"),
  ("prompts.txt", "work/prompts.txt"),
  ("prompt*.txt", "work/prompt*.txt"),
  ("nothing*.txt", None),
  ("/not/there", None),
  ("owner/name", None),  # of the hub
  ("shapes", None),  # which has a folder here too, but is the name of a model
  ("shapes/test", None),
  ("my_models:open_model", None),
  ("", None),
])
def test_the_field_of_a_config(here, value, expected):
  assert paths.of_field(value) == (value if expected is None else str(here / expected))


def test_a_config_wherever_its_paths_stand(here):
  config = config_dict.ConfigDict({
    "model": {"path": "models/base", "tokenizer": ""},
    "data": {"source": "prompts.txt", "ties": "drop"},
    "evaluation": {"source": ("prompts.txt", "*.txt", "shapes/test"), "validation": ["~/a.txt"]},
    "reward": {"names": ("clip", "models/base"), "kwargs": ({"path": "~/base"}, {})},
    "method": {"name": "models/base"},
    "num_iterations": 3,
  })
  config.lock()
  paths.make_absolute(config)
  assert config.is_locked
  work, home = here / "work", here / "home"
  assert json.loads(config.to_json()) == {
    "model": {"path": f"{work}/models/base", "tokenizer": ""},
    "data": {"source": f"{work}/prompts.txt", "ties": "drop"},
    "evaluation": {
      "source": [f"{work}/prompts.txt", f"{work}/*.txt", "shapes/test"],
      "validation": [f"{home}/a.txt"],
    },
    "reward": {"names": ["clip", "models/base"], "kwargs": [{"path": f"{home}/base"}, {}]},
    "method": {"name": "models/base"},
    "num_iterations": 3,
  }


def test_a_flag(here):
  values = flags.FlagValues()
  output = paths.define("output", None, "Where.", flag_values=values)
  values(["command", "--output=~/pictures"])
  assert output.value == here / "home" / "pictures"
  values(["command", "--output=pictures"])
  assert output.value == here / "work" / "pictures"
  values(["command", "--output=../home/./base"])
  assert output.value == here / "home" / "base"
  (here / "work" / "link").symlink_to(here / "home" / "base")
  values(["command", "--output=link"])
  assert output.value == here / "work" / "link"
  values(["command", "--output=link/../base"])
  assert output.value == here / "home" / "base"
  values(["command", "--output="])
  assert output.value is None


def test_a_home_that_is_not_there_is_an_error_of_the_flag():
  values = flags.FlagValues()
  paths.define("output", None, "Where.", flag_values=values)
  with pytest.raises(flags.IllegalFlagValueError, match="found a ~ without a home folder"):
    values(["command", "--output=~nobody_of_that_name/pictures"])
