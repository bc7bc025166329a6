"""Programs of eight devices, lowered for GPUs and TPUs, and compiled for eight virtual CPUs.

Prints, as JSON, what is read in them: `{"lowered": {mesh: ...}, "compiled": {case: ...}}`. A
program of its own, because the number of devices is fixed when JAX starts. What is compiled is an
update of all weights in bfloat16; the cases beside "right" put one fault back each.
"""

import json
import pathlib
import re
import tempfile

import jax
import programs
import pytest

from jaxalign.aot import collectives, hlo, work
from jaxalign.distributed import placement, sharding
from jaxalign.models.networks import products

MESHES = {"data=8": 1, "fsdp=8": 8, "data=2 x fsdp=4": 4}  # devices that share the weights
BATCH = 16
CUT = re.compile(
  r'sdy\.sharding_constraint .*\[\{"data", "fsdp"\}, \{\}, \{\}, \{\}\]'
  r".* tensor<\d+x\d+x\d+x\d+xbf16>"
)


def mesh_of(fsdp):
  return sharding.make_mesh(data=-1, fsdp=fsdp)


def lowered(model, fsdp):
  """Of a rollout and an update, for both platforms: what stands in those for GPUs.

  fused: calls of fused attention, which on several devices go through what cuts its operands.
  cut: heads of queries, keys or values that are said to be cut along their batch; in an update,
    their gradients too.
  """
  work_of = programs.make_work(model, mesh=mesh_of(fsdp))
  made = {"rollout": programs.rollout(work_of, BATCH), "update": programs.update(work_of, BATCH)}
  found = {}
  for name, program in made.items():
    traced = program.function.trace(*program.args)
    traced.lower(lowering_platforms=("tpu",))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found[name] = {"fused": text.count("@CustomSPMDPartitioning"), "cut": len(CUT.findall(text))}
  return found


def compiled(model, mesh):
  """What an update of all weights does on each device, and sends."""
  work_of = programs.make_work(model, trained="full", mesh=mesh)
  program = programs.update(work_of, BATCH)
  with tempfile.TemporaryDirectory() as folder:
    dumped = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
    lowered = program.function.lower(*program.args)
    text = lowered.compile(compiler_options=dumped).as_text()
    # As partitioned: CPUs then turn sums in bfloat16 into sums in float32.
    partitioned = pathlib.Path(folder).glob("*.after_spmd-partitioning.*.txt")
    sums = {
      dtype
      for path in partitioned
      for dtype in re.findall(r"= (\w+)\[[\d,]*\]\S* all-reduce\(", path.read_text())
    }
  parsed = hlo.Program(text)
  sent = collectives.find(parsed, parsed.runs, mesh) if mesh.size > 1 else []
  weights = jax.tree.leaves(work_of.state.params)
  return {
    "operations": sum(one.times * work.operations(parsed, one.instruction) for one in parsed.runs),
    "largest_sent": max((one.largest for one in sent if one.in_loop), default=0),
    "largest_weight": max(leaf.size * leaf.dtype.itemsize for leaf in weights),
    "sums": sorted(sums),
  }


def narrow_gradient(x, grad):
  """The kernel's gradient in the dtype of the product, as JAX's own rule has it."""
  return jax.lax.dot_general(grad, x, (((0,), (0,)), ((), ()))).T


FAULTS = {
  "right": lambda patch: None,
  "weights not whole": lambda patch: patch.setattr(placement, "whole", lambda x: x),
  "narrow gradients": lambda patch: patch.setattr(products, "_kernel_gradient", narrow_gradient),
}


def main():
  # A program that was compiled before would not be partitioned again, and that is what is read.
  jax.config.update("jax_enable_compilation_cache", False)
  sharding.MIN_ELEMENTS = 2**8  # or nothing of a small model would be cut
  with tempfile.TemporaryDirectory() as folder:
    with programs.described("gpu"):
      model = programs.model(programs.LEAST, pathlib.Path(folder), block_out_channels=[32])
      found = {"lowered": {name: lowered(model, fsdp) for name, fsdp in MESHES.items()}}
    cases = {}
    with programs.described("cpu"):
      alone = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
      cases["one device"] = compiled(model, alone)
    for name, put_back in FAULTS.items():
      with programs.described("cpu"), pytest.MonkeyPatch.context() as patch:
        put_back(patch)
        cases[name] = compiled(model, mesh_of(MESHES["data=2 x fsdp=4"]))
  print(json.dumps({**found, "compiled": cases}))


if __name__ == "__main__":
  main()
