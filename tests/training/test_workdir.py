"""What a workdir remembers of its run, and which changes to it are noticed."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from ml_collections import config_dict

from jaxalign.training import workdir as workdir_lib


def prepare(workdir, config):
  with workdir_lib.prepared(workdir, config):
    pass


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
  prepare(tmp_path / "run", config)
  assert digests(tmp_path / "run") == {
    "data.source": hashlib.sha256(b"a prompts.txt\n").hexdigest(),
    "evaluation.source": hashlib.sha256(b"a held_out.txt\n").hexdigest(),
    "evaluation.validation": hashlib.sha256(b"a validation.txt\n").hexdigest(),
    "held_out": hashlib.sha256(b"a pairs.parquet\n").hexdigest(),
  }
  prepare(tmp_path / "run", config)  # the same again


@pytest.mark.parametrize("source", ["{}", "{}/*.jsonl", ["{}/b-2.jsonl", "{}/b-10.jsonl"]])
@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_digest_covers_every_shard(tmp_path, source, change):
  folder = tmp_path / "shards"
  folder.mkdir()
  for name in ("b-2", "b-10"):
    (folder / f"{name}.jsonl").write_text(f"a {name}\n")
  each = [source] if isinstance(source, str) else source
  found = [one.format(folder) for one in each]
  wanted = {"data": {"source": found[0] if isinstance(source, str) else found}}
  config = config_dict.ConfigDict(wanted)
  prepare(tmp_path / "run", config)
  parts = (hashlib.sha256(b"a b-2\n").hexdigest(), hashlib.sha256(b"a b-10\n").hexdigest())
  together = hashlib.sha256("".join(f"{part}\n" for part in parts).encode()).hexdigest()
  assert digests(tmp_path / "run") == {"data.source": together}
  prepare(tmp_path / "run", config)
  if change == "edit":
    (folder / "b-10.jsonl").write_text("another\n")
  elif change == "add":
    (folder / "b-11.jsonl").write_text("another\n")
  else:
    (folder / "b-10.jsonl").unlink()
  if isinstance(source, list) and change != "edit":
    return  # what is not named does not count; what is missing is said where it is read
  with pytest.raises(ValueError, match=r"config\.data\.source: .* was edited since"):
    prepare(tmp_path / "run", config)


def test_a_run_from_before_there_was_a_field_goes_on_while_it_is_none(tmp_path, config):
  prepare(tmp_path / "run", config)
  config.data.columns = config_dict.placeholder(object)
  prepare(tmp_path / "run", config)
  config.data.columns = "prompt=text"
  with pytest.raises(ValueError, match=r"another config: config\.data differ"):
    prepare(tmp_path / "run", config)
  config.data.columns = None
  prepare(tmp_path / "run", config)


def test_what_is_no_file_has_no_digest(tmp_path):
  config = config_dict.ConfigDict({"data": {"source": "shapes/train"}, "held_out": ""})
  prepare(tmp_path / "run", config)
  assert digests(tmp_path / "run") == {}


@pytest.mark.parametrize("name, field", [
  ("prompts.txt", "data.source"), ("pairs.parquet", "held_out")
])
def test_an_edited_file_is_refused_and_nothing_is_written(tmp_path, config, name, field):
  prepare(tmp_path / "run", config)
  before = digests(tmp_path / "run")
  (tmp_path / name).write_text("another\n")
  found = hashlib.sha256(b"another\n").hexdigest()[:12]
  with pytest.raises(ValueError, match=rf"config\.{field}: .*{name} was edited since") as error:
    prepare(tmp_path / "run", config)
  assert f"expected SHA-256 {before[field][:12]}..., found {found}..." in str(error.value)
  assert "put the old file back, or choose another --workdir" in str(error.value)
  assert digests(tmp_path / "run") == before


def test_a_file_of_a_section_that_may_change_may_be_edited(tmp_path, config):
  prepare(tmp_path / "run", config)
  (tmp_path / "held_out.txt").write_text("another\n")
  prepare(tmp_path / "run", config)
  assert digests(tmp_path / "run")["evaluation.source"] == hashlib.sha256(b"another\n").hexdigest()


def test_a_run_from_before_there_were_digests_goes_on_and_has_them_then(tmp_path, config):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(config.to_json())
  prepare(tmp_path / "run", config)
  assert set(digests(tmp_path / "run")) == set(workdir_lib.DATA_FIELDS)


def test_another_config_is_named(tmp_path, config):
  prepare(tmp_path / "run", config)
  config.data.source = "shapes/train"
  config.evaluation.seed = 2  # may change
  with pytest.raises(ValueError, match=r"another config: config\.data differ"):
    prepare(tmp_path / "run", config)


# ---- one run at a time

HOLDER = """
import pathlib, sys, time
from jaxalign.training import workdir
with workdir.lock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that runs in `tmp_path`."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_a_workdir_in_use_is_refused_and_its_holder_named(tmp_path, holder):
  where = f"on host {socket.gethostname()} in process {holder.pid}"
  with pytest.raises(ValueError, match=f"a run is going on there, {where}\n.*another --workdir"):
    prepare(tmp_path, config_dict.ConfigDict({"seed": 0}))
  assert not (tmp_path / "config.json").exists()


def test_a_process_that_was_killed_holds_nothing(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with workdir_lib.lock(tmp_path):
    assert str(os.getpid()) in (tmp_path / workdir_lib.LOCK).read_text()


def test_an_error_lets_go(tmp_path):
  with pytest.raises(KeyError), workdir_lib.lock(tmp_path):
    raise KeyError
  # In one process too: two threads, or two cells of a notebook.
  with (
    workdir_lib.lock(tmp_path),
    pytest.raises(ValueError, match="a run is going on"),
    workdir_lib.lock(tmp_path),
  ):
    pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
  def refuse(file, operation):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(workdir_lib.fcntl, "flock", refuse)
  prepare(tmp_path, config_dict.ConfigDict({"seed": 0}))
  assert "cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().err
