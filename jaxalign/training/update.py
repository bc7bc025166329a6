"""One optimizer step on an iteration's data: the only gradient of the policy in the package."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign import methods, streams
from jaxalign.distributed import placement, sharding
from jaxalign.training.state import TrainState
from jaxalign.types import Array, Params

# select(data, selected) -> batch: the examples of one slice out of an iteration's data.
SelectFn = Callable[[Any, Any], Any]
# (params, frozen) -> frozen, made for a loop in which params stay the same; see `Policy.ready`.
ReadyFn = Callable[[Params, Any], Any]


def jit_update(
  method: methods.Method,
  tx: optax.GradientTransformation,
  variables_fn: Callable[[Params, Params], Params],
  select: SelectFn,
  *,
  heads_tx: Mapping[str, optax.GradientTransformation] = MappingProxyType({}),
  mesh: jax.sharding.Mesh | None = None,
  state_shardings: Any = None,
  ready_fn: ReadyFn = lambda params, frozen: frozen,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """An optimizer step whose gradient is accumulated over slices in one scan. Donates the state.

  The returned function takes `(state, frozen, data, selection, seed, i, j)`. The leaves of
  `selection` are `[slices, ...]`, and `select(data, one of them)` is the batch of a slice. The
  loss's randomness is derived from the three integers and the number of the slice. It returns the
  new state and the metrics of the loss, each `[slices, batch]`, with `grad/norm`, a scalar of the
  policy's gradient before clipping.

  Args:
    method: its loss.
    tx: the optimizer of the policy.
    variables_fn: `Policy.variables`.
    select: see `SelectFn`.
    heads_tx: the optimizers of the method's heads.
    mesh: that it runs on, one device by default.
    state_shardings: where the new state lies there.
    ready_fn: makes of the frozen trees what all slices share (`Policy.ready`).
  """
  devices = mesh or sharding.one_device()
  grad_fn = jax.grad(make_mean_loss(method, variables_fn), has_aux=True)

  def update(state, frozen, data, selection, seed, i, j):
    # The parameters stay the same until the end, so weights are cast, or merged, for all slices.
    copies = copies_ready(state.copies, frozen, variables_fn, ready_fn)
    frozen = {**ready_fn(state.params, frozen), **copies}

    def accumulate(total, number_and_selected):
      number, selected = number_and_selected
      batch = sharding.constrain_batch(select(data, selected), devices)
      key_slice = streams.stream(seed, "loss", i, j, number)
      grads, values = grad_fn(trained, frozen, batch, key_slice)
      return sharding.constrain_params(jax.tree.map(jnp.add, total, grads), devices), values

    slices = len(jax.tree.leaves(selection)[0])
    trained = state.params, state.heads
    # What is trained is float32, whatever it is computed in, so that small gradients add up.
    zeros = jax.tree.map(jnp.zeros_like, trained)
    total, values = jax.lax.scan(accumulate, zeros, (jnp.arange(slices), selection))
    grads, heads_grads = jax.tree.map(lambda leaf: leaf / slices, total)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = dataclasses.replace(state, params=params, opt_state=opt_state)
    state = update_heads(state, heads_grads, heads_tx)
    return state, {**values, "grad/norm": optax.global_norm(grads)}

  # Metrics are for the host of every process.
  placed = (state_shardings, sharding.replicated(devices))
  return placement.jit(update, devices, donate_argnums=0, out_shardings=placed)


def make_mean_loss(
  method: methods.Method, variables_fn: Callable[[Params, Params], Params]
) -> Callable[..., tuple[Array, dict[str, Array]]]:
  """`((params, heads), frozen, batch, key) -> (mean loss [], metrics {name: [B]})`."""

  def mean_loss(trained, frozen, batch, key):
    params, heads = trained
    variables = variables_fn(params, frozen["base"])
    variables = {**variables, "heads": heads} if heads else variables
    loss, values = method.loss(variables, frozen, batch, key)
    # One number an example, also where they are cut: the mean is over those of all devices.
    return jnp.mean(loss), {**values, "loss/total": loss}

  return mean_loss


def update_heads(
  state: TrainState,
  grads: Mapping[str, Params],
  heads_tx: Mapping[str, optax.GradientTransformation],
) -> TrainState:
  """A step of every head by its own optimizer."""
  heads, opt_state = dict(state.heads), dict(state.heads_opt_state)
  for name, tx in heads_tx.items():
    updates, opt_state[name] = tx.update(grads[name], opt_state[name], heads[name])
    heads[name] = optax.apply_updates(heads[name], updates)
  return dataclasses.replace(state, heads=heads, heads_opt_state=opt_state)


def copies_ready(
  copies: Mapping[str, Params],
  frozen: Mapping[str, Any],
  variables_fn: Callable[[Params, Params], Params],
  ready_fn: ReadyFn,
) -> dict[str, Params]:
  """The variables of every copy of the parameters, without a gradient.

  Each is made ready by itself: what is merged for the parameters holds no other's adapters. What
  their casts have in common XLA computes once.
  """
  return {
    name: jax.lax.stop_gradient(variables_fn(copy, ready_fn(copy, frozen)["base"]))
    for name, copy in copies.items()
  }
