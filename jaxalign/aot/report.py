"""What a compiled program takes and does, in lines for a person."""

import collections
from collections.abc import Sequence

from jax.sharding import Mesh

from jaxalign.aot.collectives import Collective
from jaxalign.aot.reading import Reading
from jaxalign.aot.topology import Topology

GIB, TERA = 2.0**30, 1e12


def heading(described: Topology, mesh: Mesh) -> str:
  """Which devices they are, and what to expect of the time that compiling takes."""
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
  lines = [
    f"{described.name}: {mesh.size} x {mesh.devices.flat[0].device_kind}, {axes}; described only, "
    "so that programs are compiled and nothing is run"
  ]
  if described.devices[0].platform == "tpu":
    lines.append(
      "for TPUs small models compile in minutes; Stable Diffusion 1.5 at full size had not after "
      "19 minutes of CPU time"
    )
  return "\n".join(lines)


def describe(
  name: str,
  found: Reading,
  described: Topology,
  mesh: Mesh,
  *,
  examples: int,
  unit: str,
  step: str,
  least: float | None,
) -> str:
  """A paragraph on one program.

  Args:
    examples: what it works on, in so many of a `unit`; step: what a pass of its main loop is. Both
      are words in the singular.
    least: operations that it needs at least, of all devices together; None where not known.
  """
  lines = [
    f"{name}: {_count(examples, unit)}{f', {_count(found.steps, step)}' if step else ''}",
    memory(found, described),
    f"work: {_work(found, mesh, examples, unit, least)}",
    f"kernels{_each(step)}: {found.step.kernels}, of them {found.fused_attention} fused attention",
    *_time(found, described, step),
  ]
  if found.weight_casts:
    lines.append(f"casts: {len(found.weight_casts)} weights are cast in every {step or 'pass'}")
  if mesh.size > 1:
    lines += _communication(found, described, step)
  return "\n  ".join(lines)


def _count(number: int, word: str) -> str:
  return f"{number} {word}{'' if number == 1 else 's'}"


def _each(step: str) -> str:
  return f" a {step}" if step else ""


def memory(found: Reading, described: Topology) -> str:
  """Of one device, against what it has."""
  over = " - TOO MUCH" if found.peak > described.memory else ""
  caveat = ", without cuDNN's workspace" if described.is_gpu else ""
  return (
    f"memory per device: {found.arguments / GIB:.2f} GiB arguments, "
    f"{found.temporaries / GIB:.2f} GiB temporaries, {found.peak / GIB:.2f} GiB at the peak, of "
    f"{described.memory / GIB:.1f} GiB{caveat}{over}"
  )


def _work(found: Reading, mesh: Mesh, examples: int, unit: str, least: float | None) -> str:
  done = found.total.operations * mesh.size
  text = f"{done / examples / TERA:.4g} TFLOP for each {unit}"
  if least is None:
    return f"{text}; the least that it could be is not known"
  return f"{text}, {done / least:.3f} of the least that it could be"


def _time(found: Reading, described: Topology, step: str) -> list[str]:
  chip = described.chip
  if not described.is_gpu:
    cycles = found.total.cycles
    return [f"cycles: {cycles / 1e6:.1f} million, as XLA guesses"] if cycles else []
  one = f"{1e3 * found.step.seconds:.2f} ms{_each(step)}, " if step else ""
  return [
    f"roofline, not measured: {one}{found.total.seconds:.3f} s in all, with every kernel at "
    f"{chip.bandwidth / TERA:.1f} TB/s or {chip.flops / TERA:.0f} TFLOP/s and no launches"
  ]


def _communication(found: Reading, described: Topology, step: str) -> list[str]:
  lines = [f"devices send{_each(step)}: {totals(found.step_collectives)}"]
  if found.steps > 1:
    once = [one for one in found.collectives if not one.in_loop]
    lines.append(f"devices send once: {totals(once)}")
  link = described.chip.link
  if link is None:
    return lines
  within, across = (bandwidth / 1e9 for bandwidth in link)
  sent = sum(one.seconds(link) for one in found.collectives)
  computed = found.total.seconds
  lines.append(
    f"implied weak scaling: {100 * computed / (computed + sent):.1f} % if nothing overlaps, "
    f"{100 * computed / max(computed, sent):.1f} % if all does ({1e3 * sent:.2f} ms at "
    f"{within:.0f} GB/s in a host and {across:.0f} across, assumed)"
  )
  return lines


def totals(found: Sequence[Collective]) -> str:
  """Collectives by kind, axis and type of number, the largest first."""
  groups: dict[tuple[str, str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
  for one in found:
    group = groups[one.kind, one.axes, "/".join(one.dtypes)]
    group[0] += one.times
    group[1] += one.times * one.num_bytes
  ordered = sorted(groups.items(), key=lambda item: -item[1][1])
  return "; ".join(
    f"{kind} over {axes} {total / 1e6:.2f} MB of {dtypes} in {count}"
    for (kind, axes, dtypes), (count, total) in ordered
  ) or "nothing"  # fmt: skip


def notes(described: Topology) -> str:
  """What a compiled program does not say."""
  if not described.is_gpu:
    return "not known from this: seconds, and whether numbers stay finite"
  return (
    "not known from this: seconds, kernels as they are tuned on the device, whether cuDNN takes "
    "every shape, and its workspace"
  )
