"""What a workdir remembers of its run, and which changes to it are noticed."""

import hashlib
import json

import pytest
from ml_collections import config_dict

from jaxalign.training import workdir as workdir_lib


@pytest.fixture
def config(tmp_path):
  """A config that names four data files."""
  for name in ("prompts.txt", "held_out.txt", "validation.txt", "pairs.parquet"):
    (tmp_path / name).write_text(f"a {name}\n")
  return config_dict.ConfigDict({
    "data": {"source": str(tmp_path / "prompts.txt")},
    "evaluation": {
      "source": str(tmp_path / "held_out.txt"),
      "validation": str(tmp_path / "validation.txt"),
      "seed": 1,
    },
    "held_out": str(tmp_path / "pairs.parquet"),
  })


def digests(workdir):
  return json.loads((workdir / "config.json").read_text())["digests"]


def test_a_new_run_writes_a_digest_of_every_data_file(tmp_path, config):
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  assert digests(tmp_path / "run") == {
    "data.source": hashlib.sha256(b"a prompts.txt\n").hexdigest(),
    "evaluation.source": hashlib.sha256(b"a held_out.txt\n").hexdigest(),
    "evaluation.validation": hashlib.sha256(b"a validation.txt\n").hexdigest(),
    "held_out": hashlib.sha256(b"a pairs.parquet\n").hexdigest(),
  }
  workdir_lib.prepare_workdir(tmp_path / "run", config)  # the same again


def test_what_is_no_file_has_no_digest(tmp_path):
  config = config_dict.ConfigDict({"data": {"source": "shapes/train"}, "held_out": ""})
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  assert digests(tmp_path / "run") == {}


@pytest.mark.parametrize("name, field", [
  ("prompts.txt", "data.source"), ("pairs.parquet", "held_out")
])
def test_an_edited_file_is_refused_and_nothing_is_written(tmp_path, config, name, field):
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  before = digests(tmp_path / "run")
  (tmp_path / name).write_text("another\n")
  found = hashlib.sha256(b"another\n").hexdigest()[:12]
  with pytest.raises(ValueError, match=rf"config\.{field}: .*{name} was edited since") as error:
    workdir_lib.prepare_workdir(tmp_path / "run", config)
  assert f"expected SHA-256 {before[field][:12]}..., found {found}..." in str(error.value)
  assert "put the old file back, or choose another --workdir" in str(error.value)
  assert digests(tmp_path / "run") == before


def test_a_file_of_a_section_that_may_change_may_be_edited(tmp_path, config):
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  (tmp_path / "held_out.txt").write_text("another\n")
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  assert digests(tmp_path / "run")["evaluation.source"] == hashlib.sha256(b"another\n").hexdigest()


def test_a_run_from_before_there_were_digests_goes_on_and_has_them_then(tmp_path, config):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(config.to_json())
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  assert set(digests(tmp_path / "run")) == set(workdir_lib.DATA_FIELDS)


def test_another_config_is_named(tmp_path, config):
  workdir_lib.prepare_workdir(tmp_path / "run", config)
  config.data.source = "shapes/train"
  config.evaluation.seed = 2  # may change
  with pytest.raises(ValueError, match=r"another config: config\.data differ"):
    workdir_lib.prepare_workdir(tmp_path / "run", config)
