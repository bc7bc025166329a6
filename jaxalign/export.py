"""Writes a model for diffusers: a run, or a model with adapters.

  python -m jaxalign.export --workdir=runs/ddpo --output=exported --format=diffusers
  python -m jaxalign.export --workdir=runs/lora --output=adapter --format=lora
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags

from jaxalign import checks, files, system
from jaxalign.cli import command, source
from jaxalign.cli import output as output_lib
from jaxalign.models.adapters import lora
from jaxalign.models.weights import lora_files
from jaxalign.training import workdir as workdir_lib
from jaxalign.types import Params

FORMATS = ("diffusers", "lora")
# Says what an export was made from, and that its folder may be replaced by another one.
RECORD = "jaxalign_export.json"


class Exported(NamedTuple):
  """What there is to write.

  variables: of the denoiser, `{"params"}` and, with an adapter, `{"lora"}`, as they are applied.
  record: where it comes from, for `RECORD`.
  """

  system: system.System
  variables: Params
  record: Mapping[str, Any]


def define_flags(values: flags.FlagValues) -> None:
  source.define(values)
  output_lib.define(values)
  flags.DEFINE_enum(
    "format",
    "diffusers",
    FORMATS,
    "A whole pipeline with the training in its weights, or the adapter alone.",
    flag_values=values,
  )


def main(values: flags.FlagValues) -> None:
  output = output_lib.folder(values)
  check_output(output)  # before anything is loaded
  write(load(values), output, values.format)
  print(output)


def check_output(folder: str | os.PathLike) -> None:
  """Raises ValueError if writing to `folder` would destroy anything but an export."""
  folder = pathlib.Path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--output: expected a folder, found the file {folder}")
  if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
    raise ValueError(
      f"--output: {folder} is not empty and holds no export ({RECORD})\nchoose another folder"
    )


def load(values: flags.FlagValues) -> Exported:
  """What the flags of `source` name."""
  if source.workdir(values) is not None:
    return of_run(source.load_run(values), strength=values.strength)
  # How it would be sampled plays no part in what is written.
  process = {"transition": "ddim", "num_steps": 1, "eta": 0.0}
  sys, params = source.load_model(values, process, {})
  variables = sys.policy.variables(params, sys.policy.base)
  return Exported(sys, variables, {"model": {"path": values.model}})


def of_run(found: workdir_lib.Run, *, strength: float = 1.0) -> Exported:
  """What a run has trained, which was loaded at that strength."""
  policy = found.system.policy
  record = {
    "model": found.config["model"],
    "lora": found.config["lora"],
    "iteration": found.step,
    "strength": strength,
  }
  return Exported(found.system, policy.variables(found.params, policy.base), record)


def write(exported: Exported, output: str | os.PathLike, format: str = "diffusers") -> None:
  """Writes the folder `output` in one of `FORMATS`, in the place of an older export there."""
  checks.check_choice("format", format, FORMATS)
  check_output(output)
  with files.replacing_folder(output) as folder:
    if format == "lora":
      write_lora(exported, folder)
    else:
      write_diffusers(exported, folder)
    files.write_json(folder / RECORD, {"format": format, **exported.record})


def write_lora(exported: Exported, folder: str | os.PathLike) -> None:
  """Writes the adapter as the file that diffusers' `load_lora_weights` reads."""
  if "lora" not in exported.variables:
    raise ValueError(
      "--format=lora: expected a run that trains an adapter, with config.lora.rank above 0; this "
      "one has weights of its own\nexport it with --format=diffusers"
    )
  adapted = exported.system.model.files.adapted
  if "denoiser" not in adapted:
    raise ValueError(
      "--format=lora: expected a model that other tools have adapters for, this has none\n"
      "export it with --format=diffusers"
    )
  lora_files.write(folder, adapted["denoiser"], exported.variables["lora"])


def write_diffusers(exported: Exported, folder: str | os.PathLike) -> None:
  """Writes the whole pipeline as a folder, the denoiser's adapter merged into its weights."""
  denoiser = exported.variables["params"]
  if "lora" in exported.variables:
    denoiser = lora.merge(denoiser, exported.variables["lora"])
  model, frozen = exported.system.model, exported.system.frozen
  params = {name: frozen.get(name, tree) for name, tree in model.params.items()}
  model.files.save({**params, "denoiser": denoiser}, pathlib.Path(folder))


if __name__ == "__main__":
  command.run(main, define_flags)
