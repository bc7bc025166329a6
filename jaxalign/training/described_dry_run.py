"""`--dry_run --topology=8xh100`: a run's programs compiled for devices that are not there.

No device, no weights: parameters, states and batches are shapes. What a compiled program says is
printed: memory, work against the least that it could be, what crosses devices, a roofline. Nothing
is timed, so there are no seconds but the roofline's.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign import checks
from jaxalign.aot import reading, report, topology
from jaxalign.aot.topology import Topology
from jaxalign.distributed import sharding
from jaxalign.methods import Inputs
from jaxalign.rewards import DeviceReward
from jaxalign.training import feeds, least_work, state
from jaxalign.training import setup as setup_lib


class Job(NamedTuple):
  """One program of a run.

  steps: passes of its main loop; step: what one is, "" without such a loop.
  examples: what it works on, in so many of a unit.
  least: operations that it needs at least, of all devices; None where that is not known.
  unknown_trips: passes of loops that are decided at run time.
  """

  name: str
  function: Any
  args: tuple
  steps: int
  step: str
  examples: int
  unit: str
  least: float | None
  unknown_trips: int = 1


def rehearse(config: Any, workdir: str | os.PathLike, described: Topology) -> None:
  """Compiles what a config would run on the described devices, and prints what it takes there."""
  workdir = pathlib.Path(workdir)
  sections = config.to_dict()
  mesh = checks.call_section(sections, "mesh", sharding.make_mesh, devices=described.devices)
  print(report.heading(described, mesh), flush=True)
  with topology.answering_for(described):
    jobs, batches = _jobs(sections, mesh, workdir)
  print(batches, flush=True)
  for job in jobs:
    compiled = reading.compile_for(described, job.function, job.args)
    found = reading.read(
      compiled.executable, described, mesh, steps=job.steps, unknown_trips=job.unknown_trips
    )
    text = report.describe(
      job.name,
      found,
      described,
      mesh,
      examples=job.examples,
      unit=job.unit,
      step=job.step,
      least=job.least,
    )
    print(text, flush=True)
  print(report.notes(described), flush=True)


def _jobs(sections: Mapping[str, Any], mesh: Mesh, workdir: pathlib.Path) -> tuple[list[Job], str]:
  """The programs of an iteration, and what the feed says of its batches."""
  evaluated = sections["evaluation"]["microbatch"]
  sharding.check_batch("config.evaluation.microbatch", evaluated, mesh)
  setup = setup_lib.assemble(sections, mesh, shapes_only=True)
  sys, rewards = setup.system, setup.rewards
  with feeds.make(setup, workdir) as feed:
    least = least_work.Programs(sys, sections, feed.tokens)
    fresh = setup.init_state(feed.init_memory())
    update_fn = setup.jit_update(fresh, feed.select)
    first = _feed_job(feed, fresh, least, sys.process.table.num_steps)
    data, selection = feed.shapes(fresh)
    args = (fresh, setup.frozen, data, selection, 0, 0, 0)
    device = rewards.device if rewards is not None else None
    return [first, _update_job(update_fn, args, feed.example, least, device)], feed.describe()


def _feed_job(
  feed: feeds.Feed, fresh: state.TrainState, least: least_work.Programs, num_steps: int
) -> Job:
  """The program that makes a microbatch of an iteration's data."""
  program = feed.program(fresh, feed.microbatch)
  if program.name == "rollout":
    count, floor = feed.microbatch, least.rollout(feed.microbatch)
    return Job(*program, num_steps, "step", count, "sample", floor)
  if program.name == "encoding":
    count = feed.microbatch
    return Job(*program, 1, "", count, feed.example, least.encoding(count))
  return Job(*program, 1, "", feed.microbatch, "record", least.conditioning(feed.microbatch))


def _update_job(
  update_fn: Any,
  args: tuple,
  example: str,
  least: least_work.Programs,
  device: DeviceReward | None,
) -> Job:
  """An optimizer step, whose main loop is that over gradient slices."""
  data, selection = args[2:4]
  slices, size = jax.tree.leaves(selection)[0].shape
  query = None
  if isinstance(data, Inputs):  # of stacked microbatches, those of one
    query = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data.query
    )
  once = least.update(size, device, query)
  return Job(
    "update",
    update_fn,
    args,
    slices,
    "slice",
    slices * size,
    example,
    None if once is None else slices * once,
    least.unknown_trips(),
  )
