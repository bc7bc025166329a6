"""Self-check after the first update: what breaks silently elsewhere, looked at in every run.

Adapters that match no layer, gradients that never arrive, rewards that are all alike: such a run
goes on for days and learns nothing. Each check has a verdict and the figures that it is based on;
all are in self_check.json.
"""

import collections
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from jaxalign import checks, files
from jaxalign.distributed import hosts, sharding
from jaxalign.system import System
from jaxalign.training.state import TrainState
from jaxalign.types import Params, Record

FILE = "self_check.json"
ACTIONS = ("stop", "warn", "off")


class Check(NamedTuple):
  """One thing that was looked at.

  passed: None where the run has nothing of the kind, or the first iteration cannot tell.
  text: the figures, in a few words; of a failure, also what to change.
  fatal: a failure is one of the run, and not of an unlucky first iteration.
  """

  name: str
  passed: bool | None
  text: str
  fatal: bool = True


def make(*, action: str) -> str:
  """The section `self_check`: "stop" ends a run of which a check fails, "warn" says so, "off"."""
  checks.check_choice("config.self_check.action", action, ACTIONS)
  return action


def run(
  action: str,
  workdir: str | os.PathLike,
  sys: System,
  state: TrainState,
  record: Mapping[str, float],
  shown: Sequence[Record],
  *,
  targets: str,
  sampling: Mapping[str, Any],
) -> str | None:
  """Checks a run after its first iteration, prints the result in lines and writes it to `FILE`.

  Args:
    action: as `make` has it.
    workdir: of the run.
    sys: whose policy still holds the parameters that the run began with.
    state: after the iteration.
    record: its metrics.
    shown: records to sample with both sets of parameters.
    targets: the regular expression of the section `lora`.
    sampling: `microbatch` and `seed`, as `System.sample_all` takes them.

  Returns:
    Why the run must not go on, or None.
  """
  workdir = pathlib.Path(workdir)
  if action == "off":
    return None
  start = sys.policy.params
  found = [trained_layers(start, targets), *rewards(record)]
  if any(check.passed is False and not check.fatal for check in found):
    unknown = "not known, as the first rewards say nothing"  # and so there is no gradient
    found += [Check("gradients", None, unknown), Check("samples_moved", None, unknown)]
  else:
    found.append(gradients(state.opt_state, sys.mesh))
    found.append(samples_moved(sys, state.params, shown, **sampling))
  found += [first_ratio(record), reference(start)]
  if hosts.is_first():
    for line in lines(found):
      tqdm.tqdm.write(line)
    files.write_json(workdir / FILE, {check.name: check._asdict() for check in found})
  failed = [check for check in found if check.passed is False and check.fatal]
  if not failed or action == "warn":
    return None
  return (
    f"self-check: {'; '.join(f'{check.name}: {check.text}' for check in failed)}\n"
    'this iteration is saved; config.self_check.action="warn" goes on in spite of it'
  )


def lines(found: Sequence[Check]) -> list[str]:
  """What the screen shows: up to three lines of what is well, and one for each failure."""
  well = [check.text for check in found if check.passed]
  third = -(-len(well) // 3)
  text = ["; ".join(well[i * third : (i + 1) * third]) for i in range(3)]
  failures = [
    f"self-check {'FAILED' if check.fatal else 'warns'}: {check.name}: {check.text}"
    for check in found
    if check.passed is False
  ]
  return [f"self-check: {line}" for line in text if line] + failures


def layer_paths(params: Params) -> list[str]:
  """The slash-joined paths of the layers of a trained tree, adapters or weights."""
  tree = params.get("lora", params.get("params"))
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return list(dict.fromkeys("/".join(key.key for key in path[:-1]) for path, _ in paths))


def trained_layers(params: Params, targets: str) -> Check:
  """Every name among the targets matched a layer; how many layers there are, by their last name."""
  paths = layer_paths(params)
  counts = collections.Counter(path.rpartition("/")[2] or "parameters" for path in paths)
  few = ", ".join(f"{name} {count}" for name, count in counts.most_common(6))
  kind = "adapters on" if "lora" in params else "weights of"
  text = f"{kind} {len(paths)} layers ({few}{', ...' if len(counts) > 6 else ''})"
  unmatched = [name for name in alternatives(targets) if not any(name in path for path in paths)]
  if unmatched:
    text += f"; none for {', '.join(unmatched)}: check config.lora.targets"
  return Check("trained_layers", not unmatched, text)


def alternatives(targets: str) -> list[str]:
  """The names in a list such as "(to_q|to_k)$"; of any other regular expression none."""
  plain = re.fullmatch(r"\^?\(?((?:\w+\|)*\w+)\)?\$?", targets)
  return plain[1].split("|") if plain else []


def gradients(opt_state: Any, mesh: jax.sharding.Mesh) -> Check:
  """Every block has met a gradient: Adam's second moments are 0 exactly where there was none."""
  moments = optax.tree_utils.tree_get(opt_state, "nu")
  tree = moments.get("lora", moments.get("params"))
  found = jax.device_get(make_reached_fn(mesh)(tree))
  blocks: dict[str, bool] = {}
  for path, reached in jax.tree_util.tree_flatten_with_path(found)[0]:
    blocks[path[0].key] = blocks.get(path[0].key, False) or bool(reached)
  without = [block for block, reached in blocks.items() if not reached]
  text = f"gradients in {len(blocks) - len(without)} of {len(blocks)} blocks"
  if without:
    text += f", none in {', '.join(without[:6])}: what is trained there does not reach the loss"
  return Check("gradients", not without, text)


def make_reached_fn(mesh: jax.sharding.Mesh) -> Any:
  """Jitted: of every array whether any of it is positive, for the hosts of all devices."""
  return jax.jit(
    lambda tree: jax.tree.map(lambda leaf: jnp.any(leaf > 0), tree),
    out_shardings=sharding.replicated(mesh),
  )


def samples_moved(
  sys: System, params: Params, records: Sequence[Record], *, microbatch: int, seed: int
) -> Check:
  """Training changes what the model samples, from the same noise."""
  before, after = (
    sys.sample_all(tree, records, microbatch=microbatch, seed=seed)[0]
    for tree in (sys.policy.params, params)
  )
  moved = float(np.abs(after.astype(np.float64) - before).mean())
  text = f"{sys.model.modality.unit} moved by {moved:.2g} on average"
  if moved > 0:
    return Check("samples_moved", True, text)
  # Gathered, as a host may hold only a part of them.
  old, new = (map(sharding.gather, jax.tree.leaves(tree)) for tree in (sys.policy.params, params))
  if all(map(np.array_equal, old, new)):
    return Check("samples_moved", None, "parameters have not moved yet, as in a warm-up")
  # Half precision may round a first small step away.
  text += ": what was trained is without effect"
  return Check("samples_moved", False, text, fatal=sys.model.dtype is None)


def rewards(record: Mapping[str, float]) -> list[Check]:
  """Rewards differ, and so do those of one group; pairs are not all ties."""
  found = []
  if record.get("reward/std") is not None:  # without a single verdict it is not defined
    spread = record["reward/std"]
    text = f"rewards {record['reward/mean']:.3g} with a deviation of {spread:.2g}"
    text += "" if spread > 0 else ": all are alike, so that there is nothing to learn"
    found.append(Check("rewards", spread > 0, text, fatal=False))
  if "reward/flat_groups" in record:
    flat = record["reward/flat_groups"]
    text = f"{flat:.0%} of groups without a spread"
    found.append(Check("groups", flat < 1, text, fatal=False))
  if "preference/ties" in record:
    ties = record["preference/ties"]
    found.append(Check("contrast", ties < 1, f"{ties:.0%} of pairs are ties", fatal=False))
  return found


def first_ratio(record: Mapping[str, float]) -> Check:
  """The importance ratio of the first update is 1."""
  error = record.get("policy/first_ratio_max_error")
  if error is None:
    return Check("first_ratio", None, "no importance ratio")
  text = "first ratio exactly 1" if error == 0 else f"first ratio off by {error:g}"
  return Check("first_ratio", error == 0, text)


def reference(params: Params) -> Check:
  """Which parameters a KL or a log-ratio is against."""
  base = "the base model, adapters off" if "lora" in params else "the weights as they were loaded"
  return Check("reference", True, f"the reference is {base}")
