"""Compiles a program for described devices, and reads what came out into numbers."""

import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.aot import casts, collectives, roofline, topology
from jaxalign.aot.collectives import Collective
from jaxalign.aot.hlo import Instruction, Program
from jaxalign.aot.topology import Topology

# Without a GPU nothing can be timed: level 0 takes defaults. The default tiles of Triton are unlike
# what timing finds, so calls of cuBLAS are the better picture.
_GPU_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}


class Compiled(NamedTuple):
  """A program, and how long it took to trace and to compile on this machine."""

  executable: jax.stages.Compiled
  trace_seconds: float
  compile_seconds: float


class Reading(NamedTuple):
  """One program, as one device runs it. A step is one pass of the loop over steps or slices.

  arguments, temporaries, peak: bytes.
  steps: passes of that loop; 1 where there is none, and a step is the whole program.
  kinds: roofline of the whole program, by kind of kernel; step_kinds: of one step.
  step_sources: of one step, by kind and source line.
  fused_attention: calls of a fused kernel in a step.
  collectives: all of them; step_collectives: of one step, with `times` of one step.
  constant_bytes: what the loop carries without changing it.
  weight_casts: conversions of arguments inside loops.
  """

  arguments: int
  temporaries: int
  peak: int
  steps: int
  kinds: dict[str, roofline.Row]
  step_kinds: dict[str, roofline.Row]
  step_sources: dict[str, roofline.Row]
  fused_attention: int
  collectives: list[Collective]
  step_collectives: list[Collective]
  constant_bytes: int
  weight_casts: list[casts.Cast]

  @property
  def total(self) -> roofline.Row:
    return roofline.total(self.kinds)

  @property
  def step(self) -> roofline.Row:
    return roofline.total(self.step_kinds)

  def step_link_seconds(self, described: Topology) -> float:
    """What the collectives of a step take at the assumed bandwidths; 0 where none is claimed."""
    link = described.chip.link
    return sum(one.seconds(link) for one in self.step_collectives) if link else 0.0

  def as_json(self, described: Topology) -> dict[str, Any]:
    """All of it, as numbers and texts."""
    rows = {name: getattr(self, name) for name in ("kinds", "step_kinds", "step_sources")}
    return {
      **self._asdict(),
      **{name: {key: row._asdict() for key, row in table.items()} for name, table in rows.items()},
      "total": self.total._asdict(),
      "step": self.step._asdict(),
      "collectives": [one._asdict() for one in self.collectives],
      "step_collectives": [one._asdict() for one in self.step_collectives],
      "step_link_seconds": self.step_link_seconds(described),
      "weight_casts": [one._asdict() for one in self.weight_casts],
    }


def compile_for(described: Topology, function: Any, args: tuple) -> Compiled:
  """Compiles a jitted function of shapes that lie on the described devices."""
  options = _GPU_OPTIONS if described.is_gpu else {}
  began = time.perf_counter()
  with topology.answering_for(described):
    lowered = function.trace(*args).lower()
    traced = time.perf_counter()
    executable = lowered.compile(compiler_options=dict(options) or None)
  return Compiled(executable, traced - began, time.perf_counter() - traced)


def read(
  executable: jax.stages.Compiled,
  described: Topology,
  mesh: Mesh,
  *,
  steps: int,
  unknown_trips: int = 1,
) -> Reading:
  """Reads a compiled program whose loop over steps or slices has `steps` passes.

  Loops whose passes the program does not state count `unknown_trips` times.
  """
  text, memory = executable.as_text(), executable.memory_analysis()
  assert text is not None and memory is not None  # every compiler that is described here has both
  program = Program(text, unknown_trips=unknown_trips)
  loop = main_loop(program, steps)
  # Executions of one step: `times` of an inner loop stay, those of the loop itself do not.
  passes = 1 if loop is None else steps
  inside = [run for run in program.runs if loop is None or (run.loops and run.loops[0] is loop)]
  step_runs = [run._replace(times=run.times // passes) for run in inside]
  chip = described.chip
  return Reading(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
    steps=passes,
    kinds=roofline.by_kind(program, program.runs, chip),
    step_kinds=roofline.by_kind(program, step_runs, chip),
    step_sources=roofline.by_source(program, step_runs, chip),
    fused_attention=sum(run.times for run in step_runs if "fmha" in run.instruction.target),
    collectives=collectives.find(program, program.runs, mesh),
    step_collectives=collectives.find(program, step_runs, mesh),
    constant_bytes=0 if loop is None else casts.constant_bytes(program, loop),
    weight_casts=casts.weight_casts(program),
  )


def main_loop(program: Program, steps: int) -> Instruction | None:
  """The outermost loop with `steps` passes that runs most; None where there is none."""
  kernels: dict[str, int] = {}
  loops: dict[str, Instruction] = {}
  for run in program.runs:
    if steps > 1 and run.loops and program.trips(run.loops[0]) == steps:
      loop = run.loops[0]
      loops[loop.name] = loop
      kernels[loop.name] = kernels.get(loop.name, 0) + run.times
  return loops[max(kernels, key=lambda name: kernels[name])] if kernels else None

