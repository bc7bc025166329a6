"""metrics.jsonl is the record of truth, through restarts and broken values."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training import metrics


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, start_step=0, **values):
  writer = metrics.Writer(workdir, start_step=start_step)
  for step in steps:
    writer.write(step, {"reward/mean": step / 2, **values})
  writer.close()


def test_one_object_a_step(tmp_path):
  writer = metrics.Writer(tmp_path, start_step=0)
  writer.write(0, {"reward/mean": np.float32(0.5), "loss/total": jnp.float32(-1.0)})
  # Flushed at once: a killed run leaves what it wrote.
  assert lines(tmp_path) == [{"step": 0, "reward/mean": 0.5, "loss/total": -1.0}]
  writer.write(1, {"reward/mean": 1})
  writer.close()
  assert lines(tmp_path)[1] == {"step": 1, "reward/mean": 1.0}


def test_what_is_not_defined_is_null_and_no_value(tmp_path):
  write(tmp_path, [0], **{"eval/kl_to_ref": None})
  assert lines(tmp_path) == [{"step": 0, "reward/mean": 0.0, "eval/kl_to_ref": None}]
  assert metrics.read(tmp_path) == [{"step": 0, "reward/mean": 0.0}]


def test_events_are_written_too(tmp_path):
  writer = metrics.Writer(tmp_path, start_step=0)
  writer.write(0, {"reward/mean": 0.25})
  writer.picture(0, "samples", np.zeros((4, 6, 3), np.uint8))
  writer.close()
  (events,) = (tmp_path / "events").iterdir()
  content = events.read_bytes()
  assert b"reward/mean" in content and b"samples" in content


def test_a_restart_drops_the_lines_it_will_write_again(tmp_path):
  write(tmp_path, range(5))
  write(tmp_path, [3, 4, 5], start_step=3, again=1.0)
  assert [record["step"] for record in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
  assert ["again" in record for record in lines(tmp_path)] == [False] * 3 + [True] * 3


def test_a_restart_from_scratch_drops_everything(tmp_path):
  write(tmp_path, range(3))
  write(tmp_path, [0])
  assert [record["step"] for record in lines(tmp_path)] == [0]


@pytest.mark.parametrize("half", ['{"step": 2, "rew', "{", "", '{"reward/mean": 1.0}', "17"])
def test_a_half_written_line_is_dropped(tmp_path, half):
  write(tmp_path, range(2))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(half)
  write(tmp_path, [2], start_step=2)
  assert [record["step"] for record in lines(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_value_is_written_and_then_raised(tmp_path, value):
  writer = metrics.Writer(tmp_path, start_step=0)
  with pytest.raises(
    metrics.NonFiniteError, match="step 7: grad/norm, loss/total became NaN or infinite"
  ):
    writer.write(7, {"loss/total": value, "reward/mean": 1.0, "grad/norm": jnp.nan})
  writer.close()
  (record,) = lines(tmp_path)
  assert record["step"] == 7 and not math.isfinite(record["loss/total"])
  assert issubclass(metrics.NonFiniteError, ValueError)  # what the commands report in one line


def test_wandb_that_is_asked_for_and_missing_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match=r"config\.log\.wandb_project .* not installed"):
    metrics.Writer(tmp_path, start_step=0, wandb_project="p")


def test_wandb_receives_every_record(tmp_path, monkeypatch):
  calls = []

  class Run:
    def log(self, values, step):
      calls.append((step, values))

    def finish(self):
      calls.append("finished")

  class Wandb:
    @staticmethod
    def init(**kwargs):
      calls.append(kwargs)
      return Run()

  monkeypatch.setitem(sys.modules, "wandb", Wandb)
  writer = metrics.Writer(tmp_path, start_step=0, wandb_project="p")
  writer.write(3, {"a": 1.0})
  writer.close()
  assert calls[0]["project"] == "p" and calls[0]["resume"] == "allow"
  assert calls[1:] == [(3, {"a": 1.0}), "finished"]
  metrics.Writer(tmp_path, start_step=4, wandb_project="p").close()  # a restart continues it there
  assert calls[3]["id"] == calls[0]["id"]


def test_the_counter_sees_new_programs_and_not_cached_calls():
  @jax.jit
  def double(x):
    return 2 * x + 1

  three, four = jnp.zeros(3), jnp.zeros(4)
  counter = metrics.CompilationCounter()
  jax.block_until_ready(double(three))
  assert counter.count == 1
  jax.block_until_ready(double(three))
  assert counter.count == 1
  jax.block_until_ready(double(four))  # another shape is another program
  assert counter.count == 2
  assert metrics.CompilationCounter().count == 0
