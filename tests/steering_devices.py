"""Best of n on eight virtual devices beside one: prints how far plans and rewards differ, as JSON.

A program of its own, because the number of devices is fixed when JAX starts.
"""

import json

import jax
import numpy as np

from jaxalign import streams, system
from jaxalign.distributed import sharding
from jaxalign.rewards import combine
from jaxalign.worlds import planner

RECORDS = planner.records("test")[:16]
MESHES = {"data=8": 1, "data=2 x fsdp=4": 4}  # devices that share the weights


def sampled(mesh, **sampler):
  sys = system.make_system(
    seed=0,
    model={"path": "planner"},
    lora=system.NO_LORA,
    process={"transition": "flow_sde", "num_steps": 4, "noise_level": 0.3},
    guidance={"scale": 1.0},
    sampler=sampler,
    rewards=combine.make_total(("planner",)),
    mesh=mesh,
  )
  noise = (0, streams.number("evaluation"), 0, 0, None, sys.pipeline.table)
  found = sys.sample_fn(sys.policy.params, sys.frozen, sys.tokenize(RECORDS), *noise)
  rows = {shard.data.shape[0] for shard in found.samples.addressable_shards}
  return np.asarray(found.samples), np.asarray(found.info["reward"]), rows


def main():
  sharding.MIN_ELEMENTS = 2**8  # or nothing of a small model would be cut
  alone = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
  plans, rewards, _ = sampled(alone, name="best_of_n", n=4)
  first, _, _ = sampled(alone, name="best_of_n", n=1)
  found = {"moved": float(np.abs(plans - first).max())}
  for name, fsdp in MESHES.items():
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
    on_mesh, values, rows = sampled(mesh, name="best_of_n", n=4)
    found[name] = {
      "plans": float(np.abs(on_mesh - plans).max()),
      "rewards": float(np.abs(values - rewards).max()),
      "rows": sorted(rows),
    }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
