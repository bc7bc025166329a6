"""Prints, as JSON, what the compiled updates of a small policy move between eight devices.

  {name: [[operation, bytes of its largest operand or result on a device], ...]}

A program of its own, because the number of virtual devices is fixed when JAX starts. The policy is
`toy_policy`'s, with latents that are much larger than its parameters and its metrics.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy_policy

from jaxalign import methods
from jaxalign.diffusion import guidance, rollout
from jaxalign.distributed import sharding
from jaxalign.training import batching, feeds, update
from jaxalign.training.state import init_state

MICROBATCH, MICROBATCHES, SLICES = 16, 2, 2
LATENT = (16, 16, 2)
PIPELINE = toy_policy.PIPELINE._replace(latent_shape=LATENT)
SLICE_BYTES = 4 * MICROBATCH * math.prod(LATENT)  # of one x_t of a gradient slice, all devices'
KWARGS = {
  "ddpo": {"clip_range": 1e-4, "kl_weight": 0.1, "advantage": toy_policy.ADVANTAGE},
  "d3po": {"beta": 0.1, "clip_range": 0.1},
  "dpo": {"beta": 100.0, "time_weight": "half", "num_draws": 1},
  "draft": {"num_grad_steps": 2, "kl_weight": 0.01},
  "nft": {
    "mix": 0.5, "advantage_limit": 5.0, "reference_weight": 0.01, "decay_rate": 0.1,
    "decay_max": 0.5, "advantage": toy_policy.ADVANTAGE,
  },
}
COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
  r"(?:-start)?\((.*?)\)"
)
ARRAY = re.compile(r"\b(pred|[su](?:8|16|32|64)|bf16|f16|f32|f64)\[([\d,]*)\]")
WIDTH = {"pred": 1, "bf16": 2}


def data_of(name, mesh):
  """`(data, selection)` as the feed of this method makes them, as shapes on the mesh."""
  steps, J, m = toy_policy.NUM_STEPS, MICROBATCHES, MICROBATCH

  def array(*shape, cut=None, dtype=jnp.float32):
    placed = sharding.replicated(mesh) if cut is None else sharding.batch(mesh, axis=cut)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

  text = {"text": array(J, m, 2, cut=1)}
  cond = guidance.Guided(text, {"text": array(1, 2)})
  rolled = rollout.Rollout(array(steps + 1, J, m, *LATENT, cut=2), array(steps, J, m, cut=2))
  examples = jax.ShapeDtypeStruct((SLICES, m), np.int32)
  transitions = batching.Selection(examples, examples, jax.ShapeDtypeStruct((SLICES, m), np.bool_))
  if name == "ddpo":
    labels = array(J * m, dtype=np.int32), {"advantages": array(J * m)}
    return ((rolled, cond), toy_policy.TABLE, *labels), transitions
  if name == "d3po":
    labels = array(J * m, 2, dtype=np.int32), {"weight": array(J * m)}
    return ((rolled, cond), toy_policy.TABLE, *labels), transitions
  if name == "nft":
    labels = array(J * m, dtype=np.int32), {"advantages": array(J * m)}
    finished = array(J, m, *LATENT, cut=1), text
    return (finished, toy_policy.TABLE, *labels), transitions
  if name == "dpo":
    labels = {"p": array(J, m, cut=1)}
    return methods.Finished(array(J, m, 2, *LATENT, cut=1), text, labels), examples
  return methods.Inputs(cond, array(J, m, cut=1)), examples


def collectives(compiled):
  """What a compiled program moves between devices: `[operation, bytes]` of each."""
  found = []
  for result, operation, operands in COLLECTIVE.findall(compiled.as_text()):
    arrays = ARRAY.findall(result) + ARRAY.findall(operands)
    sizes = [
      WIDTH.get(dtype, int(re.sub(r"\D", "", dtype)) // 8)
      * math.prod(int(size) for size in shape.split(",") if size)
      for dtype, shape in arrays
    ]
    found.append([operation, max(sizes)])
  return found


def compiled_update(name, mesh, select=None):
  """The update of a method; `select` in the place of its feed's."""
  method = methods.make(name, PIPELINE, **KWARGS[name])
  tx = optax.sgd(1.0)
  data, selection = data_of(name, mesh)
  state = init_state(toy_policy.PARAMS, tx, copies=method.copies, mesh=mesh)
  placed = sharding.params(state, mesh)
  update_fn = update.jit_update(
    method,
    tx,
    lambda params, given: {**given, **params},
    select or feeds.select_fn(method.data),
    mesh=mesh,
    state_shardings=placed,
  )
  args = (sharding.shaped(state, placed), toy_policy.FROZEN, data, selection, 0, 0, 0)
  return update_fn.lower(*args).compile()


def any_rows(data, selected):
  """Stored pairs by a plain index: what `base.pick_examples` is there to avoid."""
  j, row = jnp.divmod(selected, MICROBATCH)
  return jax.tree.map(lambda leaf: leaf[j, row], data)


def main():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  moved = {name: collectives(compiled_update(name, mesh)) for name in KWARGS}
  moved["by a plain index"] = collectives(compiled_update("dpo", mesh, any_rows))
  print(json.dumps({"moved": moved, "slice": SLICE_BYTES}))


if __name__ == "__main__":
  main()
