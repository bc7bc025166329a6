"""Fits a network from nothing, or on from a checkpoint: AdamW over batches of one loss."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from jaxalign.training import checkpoint, metrics, optim
from jaxalign.types import Array, Key, Params

# loss_fn(params, batch, key) -> (loss [], {name: []})
LossFn = Callable[[Params, Any, Key], tuple[Array, dict[str, Array]]]


def fit(
  name: str,
  workdir: str | os.PathLike,
  params: Params,
  loss_fn: LossFn,
  batches: Callable[[int], Any],
  *,
  key: Key,
  num_steps: int,
  log_every: int,
  checkpoint_every: int,
  **optimizer,
) -> Params:
  """Minimises `loss_fn` over `batches(step)` with AdamW and a cosine decay to zero.

  The loss's key of each step is a child of `key`. Starting it again on the same `workdir` continues
  from `workdir/<name>`'s newest checkpoint.
  """
  workdir = pathlib.Path(workdir)
  tx = optim.make(decay_steps=num_steps, **optimizer)

  @jax.jit
  def update(state, batch):
    key_step = jax.random.fold_in(key, state["step"])
    loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (_, values), grads = loss_and_grad(state["params"], batch, key_step)
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = jax.tree.map(jnp.add, state["params"], updates)
    return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, values

  state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": tx.init(params)}
  folder = workdir / name
  folder.mkdir(parents=True, exist_ok=True)
  manager = checkpoint.Manager(folder, every=checkpoint_every, keep=1)
  state = manager.restore_latest(state)
  start = int(state["step"])
  writer = metrics.Writer(folder, start_step=start)
  with (
    manager,
    tqdm.trange(start, num_steps, initial=start, total=num_steps, desc=name) as progress,
  ):
    for step in progress:
      state, values = update(state, batches(step))
      if (step + 1) % log_every == 0 or step + 1 == num_steps:
        values = {key: float(value) for key, value in values.items()}
        writer.write(step, values)
        progress.set_postfix({key: f"{value:.4f}" for key, value in values.items()})
      manager.save(step + 1, state, force=step + 1 == num_steps)
  writer.close()
  manager.close()
  return state["params"]
