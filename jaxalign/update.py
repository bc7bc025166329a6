"""One optimizer step on sampled trajectories: the only gradient of the policy in the package."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign import batching, methods, optim
from jaxalign.diffusion.rollout import Rollout
from jaxalign.state import TrainState
from jaxalign.types import Array, Params

Trajectories = tuple[Rollout, Any]  # of all images of an iteration, and their conditioning


def jit_update(
  method: methods.Method,
  tx: optax.GradientTransformation,
  variables_fn: Callable[[Params, Params], Params],
  *,
  ema_decay: float,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """An optimizer step whose gradient is accumulated over slices in one scan. Donates the state.

  The returned function takes `(state, frozen, trajectories, advantages [B], selection, seed, i, j)`
  and derives the loss's randomness from the three integers. It returns the new state and the
  metrics of the loss, each `[slices, microbatch]`, with `grad/norm`, a scalar taken before
  clipping.
  """

  def update(state, frozen, trajectories, advantages, selection, seed, i, j):
    # The 1 keeps it apart from the sampler's keys, which come from the same three integers.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    key = jax.random.fold_in(jax.random.fold_in(key, i), j)

    def mean_loss(params, batch, key):
      loss, values = method.loss(variables_fn(params, frozen["base"]), frozen, batch, key)
      return jnp.mean(loss), {**values, "loss/total": loss}

    def accumulate(total, number_and_selected):
      number, selected = number_and_selected
      batch = select_transitions(trajectories, advantages, selected)
      key_slice = jax.random.fold_in(key, number)
      grads, values = jax.grad(mean_loss, has_aux=True)(state.params, batch, key_slice)
      return jax.tree.map(jnp.add, total, grads), values

    slices = len(selection.image)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    total, values = jax.lax.scan(accumulate, zeros, (jnp.arange(slices), selection))
    grads = jax.tree.map(lambda leaf: leaf / slices, total)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
      ema_params = optim.ema_update(ema_params, params, decay=ema_decay)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, ema_params=ema_params)
    return state, {**values, "grad/norm": optax.global_norm(grads)}

  return jax.jit(update, donate_argnums=0)


def select_transitions(
  trajectories: Trajectories, advantages: Array, selected: batching.Selection
) -> methods.Transitions:
  """The transitions of one slice, gathered from whole trajectories; `selected` is `[m]` twice."""
  rollout, cond = trajectories
  image, i = selected
  return methods.Transitions(
    x_t=rollout.x[i, image],
    x_s=rollout.x[i + 1, image],
    i=i,
    cond=cond._replace(cond=jax.tree.map(lambda leaf: leaf[image], cond.cond)),
    old_log_prob=rollout.log_prob[i, image],
    advantages=advantages[image],
  )


@jax.jit
def collect(parts: list[Trajectories]) -> Trajectories:
  """Joins the microbatches of an iteration along the image axis."""
  rollouts, conds = zip(*parts, strict=True)
  rollout = dataclasses.replace(
    rollouts[0],
    x=jnp.concatenate([part.x for part in rollouts], axis=1),
    log_prob=jnp.concatenate([part.log_prob for part in rollouts], axis=1),
  )
  joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[part.cond for part in conds])
  return rollout, conds[0]._replace(cond=joined)
