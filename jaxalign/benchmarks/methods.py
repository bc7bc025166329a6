"""Runs of a plan on the embedded model with several seeds, and a table of what they reached.

  python -m jaxalign.recipes.shapes_preferences --output=runs/pairs
  python -m jaxalign.benchmarks.methods --output=runs/methods --seeds=3
  python -m jaxalign.benchmarks.methods --output=runs/forms --seeds=3 --plan=adapter_forms

Starting it again goes on with the runs that are missing, and writes `table.md` anew. The plans are
`methods`, every method, and `adapter_forms`, DDPO in bfloat16 on adapters beside the layers and
merged into their kernels.
"""

import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags

from jaxalign import files
from jaxalign.cli import command, paths
from jaxalign.training import metrics


class Run(NamedTuple):
  """config: of `configs`, with its variant. changes: to it, as `--config.KEY=VALUE` has them."""

  config: str
  changes: tuple[str, ...] = ()


# Two updates an iteration, so that the second has ratios that a gap could disturb. No bound ends a
# run: its gap is what is asked for.
_BFLOAT16_ADAPTER = (
  "model.dtype=bfloat16",
  "lora.rank=4",
  "lora.alpha=4",
  "batch.updates_per_epoch=2",
  "exactness.max_log_prob_gap=1.0",
  "exactness.max_share=1.0",
)
_SMALL = ("optim.learning_rate=1e-3", "model.param_dtype=bfloat16")
PLANS = {
  "methods": {
    "DDPO": Run("ddpo"),
    "D3PO": Run("d3po"),
    "DPO": Run("dpo"),
    "IPO": Run("dpo:ipo"),
    "DRaFT-1": Run("draft"),
    "DRaFT-LV": Run("draft:lv"),
    "AlignProp": Run("draft:align_prop"),
    "ReFL": Run("draft:refl"),
  },
  # "small" learns at a fifth of the rate, where the merged form is at its worst: weights stored in
  # bfloat16 have no remainder that a small change could tip over to the next number.
  "adapter_forms": {
    "side": Run("ddpo:lora", (*_BFLOAT16_ADAPTER, "lora.form=side")),
    "merged": Run("ddpo:lora", (*_BFLOAT16_ADAPTER, "lora.form=merged")),
    "side-small": Run("ddpo:lora", (*_BFLOAT16_ADAPTER, *_SMALL, "lora.form=side")),
    "merged-small": Run("ddpo:lora", (*_BFLOAT16_ADAPTER, *_SMALL, "lora.form=merged")),
  },
}

def define_flags(values: flags.FlagValues) -> None:
  paths.define(
    "output", None, "Folder of the runs and of table.md.", required=True, flag_values=values
  )
  flags.DEFINE_integer("seeds", 3, "Runs of each method.", flag_values=values)
  default = "runs/pairs/pairs.parquet"
  paths.define("pairs", default, "Preference pairs.", flag_values=values)
  flags.DEFINE_list("only", None, "Some of the plan's runs; all by default.", flag_values=values)
  flags.DEFINE_enum("plan", "methods", list(PLANS), "What to run.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  plan = PLANS[values.plan]
  names = values.only or list(plan)
  unknown = sorted(set(names) - set(plan))
  if unknown:
    raise flags.Error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(plan)}")
  output = values.output
  output.mkdir(parents=True, exist_ok=True)
  for seed in range(values.seeds):
    for name in names:
      run(output / f"{name}_{seed}", plan[name], seed, values.pairs)
      (output / "table.md").write_text(table(output, plan))
  print(table(output, plan))


def run(
  workdir: str | os.PathLike, planned: Run, seed: int, pairs: str | os.PathLike
) -> None:
  """One run in a process of its own, unless it is there; its times go to seconds.json."""
  workdir = pathlib.Path(workdir)
  if (workdir / "seconds.json").exists():
    return
  command = [sys.executable, "-m", "jaxalign.main", f"--config={planned.config}"]
  command += [f"--workdir={workdir}", f"--config.seed={seed}"]
  command += [f"--config.{change}" for change in (*planned.changes, "evaluation.kl=True")]
  if planned.config.startswith("dpo"):
    command.append(f"--config.data.source={pairs}")
  print(" ".join(command), flush=True)
  began, cpu_began = time.perf_counter(), _cpu_seconds()
  if subprocess.run(command, check=False).returncode:
    raise ValueError(f"{workdir.name} failed; its own message is above")
  spent = {"wall": time.perf_counter() - began, "cpu": _cpu_seconds() - cpu_began}
  files.write_json(workdir / "seconds.json", spent)


def _cpu_seconds() -> float:
  """Of all finished child processes; unlike wall time it bears a machine that others use too."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def table(output: str | os.PathLike, plan: Mapping[str, Run]) -> str:
  """A Markdown table with a row for each finished run."""
  output = pathlib.Path(output)
  lines = [
    "| run | seed | judge: base, aligned, gain [95 %] | learned reward: gain [95 %] | KL, nats "
    "| diversity | Vendi | clipped | gap: largest, share | samples | CPU, wall |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name in plan:
    for workdir in sorted(output.glob(f"{name}_*")):
      if (workdir / "seconds.json").exists():
        lines.append(_row(name, workdir))
  return "\n".join(lines) + "\n"


def _row(name: str, workdir: pathlib.Path) -> str:
  report = files.read_json(workdir / "evaluation.json")
  config = files.read_json(workdir / "config.json")
  seconds = files.read_json(workdir / "seconds.json")
  judge, learned = report["rewards"]["shapes"], report["rewards"].get("shapes_learned")
  diversity, vendi = report["diversity"], report["vendi"]
  cells = [
    name,
    str(config["seed"]),
    f"{judge['base']:.3f}, {judge['aligned']:.3f}, {_gain(judge)}",
    _gain(learned) if learned else "",
    "none" if report["kl_to_ref"] is None else f"{report['kl_to_ref']:.1f}",
    f"{diversity['base']:.3f} to {diversity['aligned']:.3f}",
    f"{vendi['base']:.1f} to {vendi['aligned']:.1f}",
    *_ratios(metrics.read(workdir)),
    _samples(config),
    f"{seconds['cpu']:.0f} s, {seconds['wall']:.0f} s",
  ]
  return f"| {' | '.join(cells)} |"


def _ratios(written) -> tuple[str, str]:
  """Of methods with importance ratios: the mean share clipped, and the log-probabilities' gap."""
  if "policy/log_prob_gap" not in written[0]:
    return "", ""
  clipped = sum(record["policy/clip_frac"] for record in written) / len(written)
  gap, share = (
    max(record[f"policy/{name}"] for record in written)
    for name in ("log_prob_gap", "log_prob_gap_share")
  )
  return f"{clipped:.3f}", f"{gap:.1e}, {share:.1%}"


def _gain(row) -> str:
  low, high = row["interval_95"]
  return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _samples(config) -> str:
  batch, iterations = config["batch"], config["num_iterations"]
  if "num_records" in batch:
    return f"{iterations * batch['num_records'] * batch['group_size']} images"
  unit = "pairs, stored" if "condition_dropout" in config["data"] else "images"
  return f"{iterations * batch['num_examples']} {unit}"


if __name__ == "__main__":
  command.run(main, define_flags)
