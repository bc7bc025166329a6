"""One optimizer step by hand, on a loss that is linear in its one parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import methods, streams
from jaxalign.distributed import sharding
from jaxalign.training import update
from jaxalign.training.state import init_state, jit_end

SEED, RATE = 5, 0.1
# Two slices of two examples; what an example adds to the gradient is its own number.
DATA = jnp.array([1.0, 2.0, 3.0, 6.0, 100.0])
SELECTION = np.array([[0, 1], [2, 3]])


def loss(params, frozen, batch, key):
  """The metrics say which key a slice had, and what the loss saw of the other arguments."""
  own_key = jnp.broadcast_to(jax.random.bits(key), batch.shape)
  frozen_now = jnp.broadcast_to(frozen["base"]["added"], batch.shape)
  return params["w"] * batch, {"key": own_key, "batch": batch, "added": frozen_now}


def make(tx=None, copies=(), **options):
  tx = optax.sgd(RATE) if tx is None else tx
  update_fn = update.jit_update(
    methods.Method(loss, methods.Records()),
    tx,
    lambda params, base: {"w": params["w"] + base["added"]},
    lambda data, selected: data[selected],
    **options,
  )
  return update_fn, init_state({"w": jnp.float32(1.0)}, tx, copies=copies)


def step(update_fn, state, *, i=0, j=0):
  return update_fn(state, {"base": {"added": jnp.float32(0.0)}}, DATA, SELECTION, SEED, i, j)


def test_the_gradient_is_the_mean_over_slices():
  state, values = step(*make())
  # (1 + 2 + 3 + 6) / 4 = 3; the fifth number was not selected.
  assert state.params["w"] == pytest.approx(1.0 - RATE * 3.0)
  assert values["grad/norm"] == pytest.approx(3.0)
  np.testing.assert_array_equal(values["batch"], [[1, 2], [3, 6]])
  np.testing.assert_array_equal(values["loss/total"], values["batch"])  # at w = 1


def test_the_norm_is_taken_before_clipping():
  state, values = step(*make(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE))))
  assert values["grad/norm"] == pytest.approx(3.0)
  assert state.params["w"] == pytest.approx(1.0 - RATE * 1.0)


def end(state, **decays):
  return jit_end(sharding.one_device(), None)(state, decays)


def test_copies_follow_the_parameters_at_the_end_of_an_iteration():
  """The average as `decay * old + (1 - decay) * new`; 1 leaves a copy and 0 replaces it."""
  update_fn, state = make(copies=("ema", "kept", "new"))
  assert {name: float(copy["w"]) for name, copy in state.copies.items()} == {
    "ema": 1.0, "kept": 1.0, "new": 1.0
  }
  decays = {"ema": 0.75, "kept": 1.0, "new": 0.0}
  for step_number, w, average in ((0, 0.7, 0.925), (1, 0.4, 0.79375)):
    before = state.copies
    state, _ = step(update_fn, state, i=step_number)
    assert state.copies.keys() == before.keys()
    assert state.params["w"] == pytest.approx(w)
    state = end(state, **decays)
    assert state.copies["ema"]["w"] == pytest.approx(average)
    assert state.copies["kept"]["w"] == 1.0 and state.copies["new"]["w"] == state.params["w"]
    assert state.sampling_params is state.copies["ema"] and int(state.step) == step_number + 1


def test_without_copies_an_iteration_is_counted_and_the_parameters_are_sampled_with():
  state, _ = step(*make())
  assert state.copies == {} and state.sampling_params is state.params
  w = float(state.params["w"])
  state = end(state)
  assert int(state.step) == 1 and state.params["w"] == w


def test_the_loss_sees_the_variables_of_copies_and_no_gradient_goes_there():
  """Each made ready for itself: "added" is what `ready` made of the copy, not of the policy."""

  def loss(variables, frozen, batch, key):
    value = variables["w"] * frozen["old"]["w"] * batch
    return value, {"old": jnp.broadcast_to(frozen["old"]["w"], batch.shape)}

  def ready(params, frozen):
    return {**frozen, "base": {"added": frozen["base"]["added"] + params["w"]}}

  tx = optax.sgd(RATE)
  update_fn = update.jit_update(
    methods.Method(loss, methods.Records()),
    tx,
    lambda params, base: {"w": params["w"] + base["added"]},
    lambda data, selected: data[selected],
    ready_fn=ready,
  )
  state = init_state({"w": jnp.float32(1.0)}, tx, copies=("old",))
  copies = {"old": {"w": jnp.float32(3.0)}}
  state, values = step(update_fn, dataclasses.replace(state, copies=copies))
  np.testing.assert_array_equal(values["old"], np.full((2, 2), 6.0))  # 3 + 3
  # d / dw of (w + added) 6 batch, of mean batch 3: what was made ready is a constant.
  assert state.params["w"] == pytest.approx(1.0 - RATE * 18.0)
  assert state.copies["old"]["w"] == 3.0


def test_a_head_is_trained_by_the_same_loss_with_an_optimizer_of_its_own():
  """A baseline b of the batch: loss w batch + (b - batch)^2 / 2, whose slope in b is b - 3."""

  def loss(variables, frozen, batch, key):
    b = variables["heads"]["baseline"]["b"]
    return variables["w"] * batch + 0.5 * jnp.square(b - batch), {"baseline": b + 0.0 * batch}

  tx, heads_tx = optax.sgd(RATE), {"baseline": optax.sgd(0.5)}
  update_fn = update.jit_update(
    methods.Method(loss, methods.Records()),
    tx,
    lambda params, base: {"w": params["w"] + base["added"]},
    lambda data, selected: data[selected],
    heads_tx=heads_tx,
  )
  heads = {"baseline": {"b": jnp.float32(1.0)}}
  state = init_state({"w": jnp.float32(1.0)}, tx, copies=("old",), heads=heads, heads_tx=heads_tx)
  state, values = step(update_fn, state)
  np.testing.assert_array_equal(values["baseline"], np.ones((2, 2)))
  assert state.heads["baseline"]["b"] == pytest.approx(1.0 + 0.5 * 2.0)
  assert state.params["w"] == pytest.approx(1.0 - RATE * 3.0)
  assert values["grad/norm"] == pytest.approx(3.0)  # of the policy alone
  state = end(state, old=0.5)
  assert set(state.copies["old"]) == {"w"} and state.heads["baseline"]["b"] == pytest.approx(2.0)


def test_slices_updates_and_iterations_have_keys_of_their_own():
  found = []
  for i in (0, 1):
    for j in (0, 1):
      _, values = step(*make(), i=i, j=j)
      assert (values["key"][:, 0] == values["key"][:, 1]).all()  # of one slice
      expected = [jax.random.bits(streams.stream(SEED, "loss", i, j, k)) for k in (0, 1)]
      np.testing.assert_array_equal(values["key"][:, 0], expected)
      found += values["key"][:, 0].tolist()
  assert len(set(found)) == 8


def test_the_loss_sees_the_whole_network_and_the_frozen_trees_as_they_are_made_ready():
  def ready(params, frozen):
    return {**frozen, "base": {"added": frozen["base"]["added"] + params["w"]}}

  _, values = step(*make(ready_fn=ready))
  np.testing.assert_array_equal(values["added"], np.ones((2, 2)))
  np.testing.assert_array_equal(values["loss/total"], 2 * values["batch"])  # w + added = 2
