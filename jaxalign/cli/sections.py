"""What the sections of a config are for: the functions that they feed, and whether they fit them.

A section is unpacked into the function that owns it, so that its keys, which of them may be left
out, and what kind of value each has are said by that function's signature alone. All sections are
looked at before the first of them is used: a run does not end at its last one.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign import checks, methods, steering
from jaxalign.data import examples, records
from jaxalign.diffusion import guidance, transitions
from jaxalign.distributed import sharding
from jaxalign.evaluation import evaluation, pictures
from jaxalign.labels import advantages
from jaxalign.models import families
from jaxalign.models.adapters import policy
from jaxalign.rewards import combine, scoring
from jaxalign.training import batching, checkpoint, guard, metrics, optim, self_check
from jaxalign.training.feeds import exactness, stored

# `check(what, section, sections)` raises ValueError unless the section fits its owner.
Check = Callable[[str, Any, Mapping[str, Any]], None]


def owned_by(function: Callable, *given: str) -> Check:
  """The check of a section of one owner, whose arguments `given` the run gives itself."""

  def check(what: str, section: Any, sections: Mapping[str, Any]) -> None:
    del sections
    checks.check_section(what, section, function, **dict.fromkeys(given))

  return check


def _counts(check: Check, *counts: str, **least: int) -> Check:
  """The check, and that `counts` are at least 1 and other numbers at least `least`.

  Their owners are made late, or would first take all memory for as many things as asked for.
  """
  ranges = {name: (low, math.inf) for name, low in least.items()}
  ranges |= {name: (1, checks.MOST) for name in counts}

  def check_fn(what: str, section: Any, sections: Mapping[str, Any]) -> None:
    check(what, section, sections)
    for name, (low, high) in ranges.items():
      if name in section:
        checks.check_range(f"{what}.{name}", section[name], low, high)

  return check_fn


def _named(make: Callable, table: Mapping[str, Callable], *given: str, default: str = "") -> Check:
  """The check of a section whose `name` says which function of the table its other keys are of.

  A user's own function is looked at where it is made, after what is cheaper to look at.
  """
  parameters = inspect.signature(make).parameters.values()
  own = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}

  def check(what: str, section: Any, sections: Mapping[str, Any]) -> None:
    section = checks.check_section(what, section, make, **dict.fromkeys(given))
    name = section.get("name", default)
    if name in table:
      rest = {key: value for key, value in section.items() if key not in own}
      more = {"advantage": None} if "advantage" in sections and what == "config.method" else {}
      checks.check_section(f"{what} {name!r}", rest, table[name], *[None] * len(given), **more)

  return check


def _model(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  del sections
  section = checks.check_section(what, section, families.open_model)
  families.check_options(**section)


def _process(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  if ":" in str(sections["model"].get("path", "")):
    return  # a family of one's own has a process of its own
  make = transitions.make_process
  section = checks.check_section(what, section, make, scheduler_config=None)
  known = inspect.signature(make).parameters
  knobs = {key: value for key, value in section.items() if key not in known}
  transitions.find_kind(section.get("transition", known["transition"].default), knobs)


def _data(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  """Of a method of one's own, its examples may have any options."""
  if ":" in str(sections["method"].get("name", "")):
    return
  owners = (records.load, stored.read, examples.pairs, examples.thumbs)
  parameters = [p for owner in owners for p in inspect.signature(owner).parameters.values()]
  ours = ("record", "examples", "model", "options")
  taken = {p.name: p.replace(kind=p.KEYWORD_ONLY, default=None) for p in parameters}
  merged = inspect.Signature([p for name, p in taken.items() if name not in ours])

  def owner(**section: Any) -> None: ...

  owner.__signature__ = merged  # type: ignore[attr-defined]
  checks.check_section(what, section, owner)


def _batch(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  """Of records and groups, or of examples: whichever has more of the keys."""
  online = owned_by(batching.solve, "steps", "count_examples", "devices")
  of_examples = isinstance(section, Mapping) and "num_examples" in section
  check = owned_by(batching.solve_examples) if of_examples else online
  check(what, section, sections)


def _evaluation(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  owned_by(evaluation.make_evaluations, "known", "retry")(what, section, sections)
  if section.get("sampler") is not None:
    _sampler(f"{what}.sampler", section["sampler"], sections)


def top_level(*, seed: int, num_iterations: int, ema_decay: float = 0.0) -> None:
  """Raises ValueError for a number that would be found wrong only after hours, or never."""
  checks.check_seed("config.seed", seed)
  if num_iterations < 1:
    raise ValueError(f"config.num_iterations: expected at least 1, got {num_iterations}")
  if not 0.0 <= ema_decay < 1.0:
    raise ValueError(f"config.ema_decay: expected 0 (no average) up to below 1, got {ema_decay}")


_sampler = _named(steering.make, steering.SAMPLERS, "pipeline")

# Of a run that aligns a model. The optional ones are for methods and settings that want them.
REQUIRED: dict[str, Check] = {
  "mesh": owned_by(sharding.make_mesh, "devices"),
  "model": _model,
  "lora": _counts(owned_by(policy.make_policy, "denoiser", "key", "dtype"), rank=0),
  "process": _counts(_process, "num_steps"),
  "guidance": _named(guidance.make, guidance.GUIDANCE, "denoise_fn", default=guidance.DEFAULT),
  "method": _named(methods.make, methods.METHODS, "pipeline"),
  "optim": owned_by(optim.make),
  "data": _data,
  "batch": _counts(
    _batch,
    *("num_records", "group_size", "num_examples", "microbatch"),
    *("updates_per_epoch", "num_epochs"),
  ),
  "evaluation": _counts(_evaluation, "num_samples", "microbatch", every=0),
  "guard": owned_by(guard.make, "rewards", "every", "kl", "has_kl"),
  "self_check": owned_by(self_check.make),
  "samples": _counts(
    owned_by(pictures.Samples, "workdir", "evaluation", "writer"), "num_samples", every=0
  ),
  "checkpoint": _counts(owned_by(checkpoint.Manager, "workdir", "folder"), every=0, keep=1),
  "log": owned_by(metrics.make_writer, "workdir", "start_step"),
}
OPTIONAL: dict[str, Check] = {
  "sampler": _sampler,
  "reward": owned_by(combine.make_total, "shapes_only", "known"),
  "reward_pool": owned_by(scoring.Scorer, "total", "on_mesh", "records", "query"),
  "exactness": owned_by(exactness.make),
  "advantage": _named(advantages.make, advantages.ESTIMATORS),
}


def check(sections: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the field, unless every section of a config fits its owner."""
  numbers = inspect.signature(top_level).parameters
  given = {name: sections[name] for name in numbers if name in sections}
  checks.check_section("config", given, top_level)
  top_level(**given)
  for name, check_fn in {**REQUIRED, **OPTIONAL}.items():
    if name in sections:
      check_fn(f"config.{name}", sections[name], sections)
    elif name in REQUIRED:
      raise ValueError(f"config.{name} is missing; see configs/ for a config that has it")
