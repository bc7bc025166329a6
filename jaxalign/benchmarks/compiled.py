"""Programs compiled for GPUs or TPUs that are not there: memory, kernels, traffic, a roofline.

  pip install "jaxalign[aot-gpu]"
  python -m jaxalign.benchmarks.compiled --topology=8xh100 --output=runs/compiled \\
    --case=sd15-ddpo-rollout,sd15-ddpo-update
  python -m jaxalign.benchmarks.compiled --output=runs/compiled --fill=docs/benchmarks.md

The first command compiles and leaves a `.json` for each case, in one to three minutes each on a
CPU; the second writes what there is into the page. Nothing is run and no weights are made: models
are shapes. Settings are those of the method's config, but for the ones that all cases share:
bfloat16, guidance 5, eta 1, 50 steps, adapters of rank 4 on the attention or (`-full`) all weights,
8 images a device at 512 pixels, 2 with XL at 1024. `--set=lora.form=merged` changes one.
"""

import ast
import functools
from typing import Any

import jax
from absl import flags

from jaxalign import files
from jaxalign.benchmarks import compiled_cases, compiled_report
from jaxalign.cli import command, paths


def define_flags(values: flags.FlagValues) -> None:
  define_integer = functools.partial(flags.DEFINE_integer, flag_values=values)
  define_path = functools.partial(paths.define, flag_values=values)
  flags.DEFINE_string("topology", None, "Devices, such as 8xh100 or v5e:2x4.", flag_values=values)
  define_integer("fsdp", 1, "Devices that share the weights; the rest is data.")
  flags.DEFINE_list("case", [], "Programs to compile.", flag_values=values)
  define_path("output", None, "Folder of the results.", required=True)
  define_path("fill", None, "Page whose tables are filled from the results.")
  help = "SECTION.KEY=VALUE of the config, repeated."
  flags.DEFINE_multi_string("set", [], help, flag_values=values)
  define_integer("batch", None, "Images, pairs or prompts a device, of one slice.")
  define_integer("slices", 2, "Gradient slices of an update; one is no loop.")
  define_integer("sources", 0, "Print so many source lines that take longest.")
  flags.DEFINE_bool("hlo", False, "Keep the programs' text beside the results.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  output = values.output
  unknown = sorted(set(values.case) - set(compiled_cases.CASES))
  if unknown:
    known = ", ".join(compiled_cases.CASES)
    raise flags.Error(f"--case: unknown {', '.join(unknown)}; known: {known}")
  if not values.case and not values.fill:
    raise flags.Error("expected --topology and --case, or --fill")
  if values.case and not values.topology:
    raise flags.Error("--topology: expected described devices, such as 8xh100, got none")
  # What little is computed, such as fresh adapters, is computed here.
  jax.config.update("jax_platforms", "cpu")

  output.mkdir(parents=True, exist_ok=True)
  changes = dict(_change(text) for text in values.set)
  for name in values.case:
    result, text = compiled_cases.run(
      compiled_cases.CASES[name],
      topology_name=values.topology,
      fsdp=values.fsdp,
      batch=values.batch,
      slices=values.slices,
      changes=changes,
    )
    result = {"case": name, **result}
    file = output / compiled_report.file_name(result)
    files.write_json(file, result)
    if values.hlo:
      file.with_suffix(".hlo.txt").write_text(text)
    print(compiled_report.describe(result, sources=values.sources), flush=True)
  if values.fill:
    compiled_report.fill(values.fill, output)


def _change(text: str) -> tuple[str, Any]:
  """A value as Python writes it, or else the text itself."""
  key, equals, value = text.partition("=")
  if not equals or "." not in key:
    raise flags.Error(f"--set: expected SECTION.KEY=VALUE, got {text!r}")
  try:
    return key, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return key, value


if __name__ == "__main__":
  command.run(main, define_flags)
