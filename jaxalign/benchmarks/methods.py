"""Runs every method on the embedded model with several seeds, and tabulates what it reached.

  python -m jaxalign.data.shapes_preferences --output=runs/pairs
  python -m jaxalign.benchmarks.methods --output=runs/methods --seeds=3

Starting it again goes on with the runs that are missing, and writes `table.md` anew.
"""

import pathlib
import resource
import subprocess
import sys
import time

from absl import flags

from jaxalign import command, files

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the runs and of table.md.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method.")
_PAIRS = flags.DEFINE_string("pairs", "runs/pairs/pairs.parquet", "Preference pairs.")
_ONLY = flags.DEFINE_list("only", None, "Some of the methods; all by default.")

METHODS = {
  "DDPO": "ddpo.py",
  "D3PO": "d3po.py",
  "DPO": "dpo.py",
  "IPO": "dpo.py:ipo",
  "DRaFT-1": "draft.py",
  "DRaFT-LV": "draft.py:lv",
  "AlignProp": "draft.py:align_prop",
  "ReFL": "draft.py:refl",
}
CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def main(argv):
  del argv
  names = _ONLY.value or list(METHODS)
  unknown = sorted(set(names) - set(METHODS))
  if unknown:
    raise flags.Error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(METHODS)}")
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)
  for seed in range(_SEEDS.value):
    for name in names:
      run(output / f"{name}_{seed}", METHODS[name], seed)
      (output / "table.md").write_text(table(output))
  print(table(output))


def run(workdir: pathlib.Path, config: str, seed: int) -> None:
  """One run in a process of its own, unless it is there; its times go to seconds.json."""
  if (workdir / "seconds.json").exists():
    return
  command = [sys.executable, "-m", "jaxalign.main", f"--config={CONFIGS / config}"]
  command += [f"--workdir={workdir}", f"--config.seed={seed}"]
  if config.startswith("dpo"):
    command.append(f"--config.data.source={_PAIRS.value}")
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


def table(output: pathlib.Path) -> str:
  """A Markdown table with a row for each finished run."""
  lines = [
    "| method | seed | judge: base, aligned, gain [95 %] | learned reward: gain [95 %] | KL, nats "
    "| diversity | Vendi | samples | CPU, wall |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name in METHODS:
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
    f"{report['kl_to_ref']:.1f}",
    f"{diversity['base']:.3f} to {diversity['aligned']:.3f}",
    f"{vendi['base']:.1f} to {vendi['aligned']:.1f}",
    _samples(config),
    f"{seconds['cpu']:.0f} s, {seconds['wall']:.0f} s",
  ]
  return f"| {' | '.join(cells)} |"


def _gain(row) -> str:
  low, high = row["interval_95"]
  return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _samples(config) -> str:
  batch, iterations = config["batch"], config["num_iterations"]
  if "num_prompts" in batch:
    return f"{iterations * batch['num_prompts'] * batch['images_per_prompt']} images"
  unit = "pairs, stored" if "prompt_dropout" in config["data"] else "images"
  return f"{iterations * batch['num_examples']} {unit}"


if __name__ == "__main__":
  command.run(main)
