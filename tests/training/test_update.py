"""One optimizer step by hand, on a loss that is linear in its one parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import methods, streams
from jaxalign.training import update
from jaxalign.training.state import init_state

SEED, RATE = 5, 0.1
# Two slices of two examples; what an example adds to the gradient is its own number.
DATA = jnp.array([1.0, 2.0, 3.0, 6.0, 100.0])
SELECTION = np.array([[0, 1], [2, 3]])


def loss(params, frozen, batch, key):
  """The metrics say which key a slice had, and what the loss saw of the other arguments."""
  own_key = jnp.broadcast_to(jax.random.bits(key), batch.shape)
  frozen_now = jnp.broadcast_to(frozen["base"]["added"], batch.shape)
  return params["w"] * batch, {"key": own_key, "batch": batch, "added": frozen_now}


def make(tx=None, *, ema_decay=0.0, **options):
  tx = optax.sgd(RATE) if tx is None else tx
  update_fn = update.jit_update(
    methods.Method(loss, "any"),
    tx,
    lambda params, base: {"w": params["w"] + base["added"]},
    lambda data, selected: data[selected],
    ema_decay=ema_decay,
    **options,
  )
  state = init_state({"w": jnp.float32(1.0)}, tx, None, with_ema=ema_decay > 0)
  return update_fn, state


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


def test_the_average_follows_the_new_parameters():
  update_fn, state = make(ema_decay=0.75)
  assert state.ema_params["w"] == 1.0
  state, _ = step(update_fn, state)
  assert state.params["w"] == pytest.approx(0.7)
  assert state.ema_params["w"] == pytest.approx(0.75 * 1.0 + 0.25 * 0.7)  # 0.925
  assert state.sampling_params is state.ema_params
  state, _ = step(update_fn, state, j=1)
  assert state.params["w"] == pytest.approx(0.4)
  assert state.ema_params["w"] == pytest.approx(0.75 * 0.925 + 0.25 * 0.4)  # 0.79375


def test_without_an_average_the_parameters_are_sampled_with():
  state, _ = step(*make())
  assert state.ema_params is None and state.sampling_params is state.params


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
