"""Checkpoints: the same bits back, and a clear end when they cannot be had."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.labels import advantages
from jaxalign.training import checkpoint
from jaxalign.training import state as state_lib

# After a refusal the threads of the storage library find their event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TX = optax.adamw(1e-3)


def make_state(*, with_ema=True, with_stats=True, rank=2, step=0):
  """A state as it is after some iterations: hardly a number in it is zero or one."""
  rng = np.random.default_rng(step)

  def draw(leaf):
    return jnp.asarray(rng.normal(size=leaf.shape) * 100).astype(leaf.dtype)

  params = {"lora": {"a": np.zeros((5, rank), np.float32), "b": np.zeros((rank, 3), np.float32)}}
  stats = advantages.init_record_stats(3, 4) if with_stats else None
  copies = ("ema", "old") if with_ema else ()
  state = jax.eval_shape(lambda: state_lib.init_state(params, TX, stats, copies=copies))
  return dataclasses.replace(jax.tree.map(draw, state), step=jnp.int32(step))


def save(workdir, *states, every=1, keep=10, force=False):
  manager = checkpoint.Manager(workdir, every=every, keep=keep)
  for state in states:
    step = int(state.step)
    # The loop counts in numpy.
    manager.save(step, dataclasses.replace(state, step=np.int32(step)), force=force)
  manager.close()


def restore(workdir, like):
  manager = checkpoint.Manager(workdir, every=1, keep=10)
  try:
    return manager.restore_latest(like)
  finally:
    manager.close()


def steps_in(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def contents(workdir):
  return {p.relative_to(workdir): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert one.dtype == other.dtype and one.shape == other.shape
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("with_ema", [True, False])
@pytest.mark.parametrize("with_stats", [True, False])
def test_a_roundtrip_gives_the_same_bits(tmp_path, with_ema, with_stats):
  saved = make_state(with_ema=with_ema, with_stats=with_stats, step=7)
  save(tmp_path, saved)
  like = make_state(with_ema=with_ema, with_stats=with_stats)
  restored = restore(tmp_path, like)
  assert_same_bits(restored, saved)
  assert set(restored.copies) == ({"ema", "old"} if with_ema else set())
  assert (restored.memory is None) == (not with_stats)
  assert isinstance(restored, state_lib.TrainState)


def test_without_a_checkpoint_the_state_itself_comes_back(tmp_path):
  state = make_state()
  assert restore(tmp_path, state) is state


def test_a_restored_state_trains_on(tmp_path):
  save(tmp_path, make_state(step=1))
  restored = restore(tmp_path, make_state())
  # Donation is what an update does; a restored array must allow it.
  moved = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(restored)
  assert int(moved.step) == 2


def test_saved_when_due_or_forced_and_only_the_newest_are_kept(tmp_path):
  state = make_state()
  manager = checkpoint.Manager(tmp_path, every=3, keep=2)
  for step in range(1, 12):
    manager.save(step, dataclasses.replace(state, step=np.int32(step)))
  manager.close()
  assert steps_in(tmp_path) == [6, 9]
  manager = checkpoint.Manager(tmp_path, every=3, keep=2)
  manager.save(10, dataclasses.replace(state, step=np.int32(10)))
  manager.save(11, dataclasses.replace(state, step=np.int32(11)), force=True)
  manager.close()
  assert steps_in(tmp_path) == [9, 11]
  assert int(restore(tmp_path, state).step) == 11


def test_the_first_step_is_not_special(tmp_path):
  save(tmp_path, make_state(step=1), make_state(step=2), every=5)
  assert steps_in(tmp_path) == []


def test_every_zero_saves_with_force_only(tmp_path):
  save(tmp_path, make_state(step=5), every=0)
  assert steps_in(tmp_path) == []
  save(tmp_path, make_state(step=5), every=0, force=True)
  assert steps_in(tmp_path) == [5]


def test_saving_a_step_twice_is_no_error(tmp_path):
  save(tmp_path, make_state(step=2))
  save(tmp_path, make_state(step=2), force=True)
  assert steps_in(tmp_path) == [2]


def test_an_update_that_donates_the_state_does_not_reach_the_checkpoint(tmp_path):
  add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = add_one({"x": jnp.zeros((1000, 1000)), "none": None})
  manager = checkpoint.Manager(tmp_path, every=1, keep=5)
  manager.save(1, state)
  for _ in range(4):
    state = add_one(state)  # while the writer is still at work
  jax.block_until_ready(state)
  manager.close()
  assert (checkpoint.read_latest(tmp_path)[1]["x"] == 1).all()


# ---- read_latest


def test_read_latest_needs_no_state(tmp_path):
  saved = make_state(step=4, with_ema=False)
  save(tmp_path, make_state(step=3), saved)
  before = contents(tmp_path)
  step, tree = checkpoint.read_latest(tmp_path)
  assert step == 4 and tree["step"] == 4
  np.testing.assert_array_equal(tree["params"]["lora"]["a"], saved.params["lora"]["a"])
  np.testing.assert_array_equal(tree["memory"]["count"], saved.memory.count)
  assert not tree["copies"]
  assert contents(tmp_path) == before


def test_reading_leaves_what_a_running_job_is_writing(tmp_path):
  save(tmp_path, make_state(step=4))
  unfinished = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "default"
  unfinished.mkdir(parents=True)
  (unfinished / "half").write_text("half")
  assert checkpoint.read_latest(tmp_path)[0] == 4
  assert (unfinished / "half").exists()
  assert int(restore(tmp_path, make_state()).step) == 4


@pytest.mark.parametrize("folder", [None, "checkpoints"])
def test_nothing_to_read_is_said(tmp_path, folder):
  if folder:
    (tmp_path / folder).mkdir()
  with pytest.raises(ValueError, match=r"expected a checkpoint in .*checkpoints, found none"):
    checkpoint.read_latest(tmp_path)
  assert not contents(tmp_path)


# ---- what cannot be restored


def expect_refusal(workdir, function, step):
  before = contents(workdir)
  with pytest.raises(ValueError) as caught:
    function()
  message = str(caught.value)
  assert len(message.splitlines()) == 2
  folder = workdir / "checkpoints" / str(step)
  assert message.startswith(f"checkpoint {folder} does not fit this run: ")
  assert "move that folder away to use the one before" in message
  assert contents(workdir) == before
  return folder


@pytest.mark.parametrize("change", [{"rank": 3}, {"with_ema": False}, {"with_stats": False}])
def test_another_shape_or_structure_is_refused(tmp_path, change):
  save(tmp_path, make_state(step=2))
  expect_refusal(tmp_path, lambda: restore(tmp_path, make_state(**change)), 2)


def damage(folder, kind):
  if kind == "data":
    (largest,) = (folder / "default" / "d").iterdir()
    largest.write_bytes(largest.read_bytes()[:-20])
  elif kind == "names":
    path = folder / "default" / "_METADATA"
    path.write_text(path.read_text()[:-20])
  elif kind == "manifest":
    (folder / "default" / "manifest.ocdbt").unlink()
  elif kind == "empty":
    shutil.rmtree(folder / "default")


@pytest.mark.parametrize("kind", ["data", "names", "manifest", "empty"])
def test_a_damaged_checkpoint_is_refused_kept_and_its_advice_works(tmp_path, kind):
  states = make_state(step=1), make_state(step=2)
  save(tmp_path, *states)
  damage(tmp_path / "checkpoints" / "2", kind)
  folder = expect_refusal(tmp_path, lambda: restore(tmp_path, make_state()), 2)
  expect_refusal(tmp_path, lambda: checkpoint.read_latest(tmp_path), 2)
  shutil.rmtree(folder)
  assert_same_bits(restore(tmp_path, make_state()), states[0])


# ---- what ends a run loses no iteration


def finished(workdir):
  return checkpoint.read_latest(workdir)[0]


def test_an_error_saves_the_last_whole_iteration(tmp_path, capsys):
  with pytest.raises(KeyError), checkpoint.Manager(tmp_path, every=4, keep=1) as manager:
    for step in (1, 2):
      manager.save(step, make_state(step=step))
    raise KeyError
  assert finished(tmp_path) == 2
  assert "iteration 2 is saved" in capsys.readouterr().err


def test_what_an_update_has_taken_is_no_iteration(tmp_path):
  first, second = make_state(step=1), make_state(step=2)
  with pytest.raises(KeyError), checkpoint.Manager(tmp_path, every=1, keep=1) as manager:
    manager.save(1, first)
    manager.wait()
    manager._every = 0
    manager.save(2, second)
    jax.tree.leaves(second)[0].delete()  # as donation does
    raise KeyError
  assert finished(tmp_path) == 1


def test_nothing_is_saved_twice_or_without_an_error(tmp_path):
  with checkpoint.Manager(tmp_path, every=2, keep=9) as manager:
    for step in (1, 2, 3):
      manager.save(step, make_state(step=step))
  assert finished(tmp_path) == 2
  with pytest.raises(KeyboardInterrupt), checkpoint.Manager(tmp_path, every=0, keep=9) as manager:
    manager.save(4, make_state(step=4))
    raise KeyboardInterrupt  # the second one: the user wants an end now
  assert finished(tmp_path) == 2


def test_a_disk_without_room_is_said_before_and_after_training(tmp_path, monkeypatch):
  state = make_state()
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  room = {"free": needed}
  usage = checkpoint.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(**room))
  manager = checkpoint.Manager(tmp_path, every=1, keep=1)
  assert manager.restore_latest(state) is state
  manager.save(1, state)
  manager.wait()
  room["free"] -= 1
  for ask in (lambda: manager.save(2, state), lambda: manager.restore_latest(state)):
    with pytest.raises(OSError, match=r"MB of room, found .*\nthe newest is of iteration 1; make"):
      ask()
  assert finished(tmp_path) == 1


def test_what_cannot_be_written_is_said_in_two_lines(tmp_path, monkeypatch):
  manager = checkpoint.Manager(tmp_path, every=1, keep=1)

  def fail(*args, **kwargs):
    raise ValueError(f"RESOURCE_EXHAUSTED: {'a/' * 999}: No space left on device\nmore")

  monkeypatch.setattr(manager._manager, "wait_until_finished", fail)
  with pytest.raises(OSError, match="No space left on device\nnone is there yet; make") as error:
    manager.wait()
  assert len(str(error.value)) < 700
