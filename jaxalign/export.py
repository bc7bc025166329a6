"""Writes a model for diffusers: a run, or a model with adapters.

  python -m jaxalign.export --workdir=runs/ddpo --output=exported --format=diffusers
  python -m jaxalign.export --workdir=runs/lora --output=adapter --format=lora
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags

from jaxalign import files, system
from jaxalign.cli import command, source
from jaxalign.cli import output as output_lib
from jaxalign.models.adapters import lora
from jaxalign.models.weights import lora_files
from jaxalign.types import Params

_FORMAT = flags.DEFINE_enum(
  "format",
  "diffusers",
  ["diffusers", "lora"],
  "A whole pipeline with the training in its weights, or the adapter alone.",
)

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


def main(argv):
  del argv
  output = output_lib.folder()
  check_output(output)
  exported = load()
  with files.replacing_folder(output) as folder:
    if _FORMAT.value == "lora":
      write_lora(exported, folder)
    else:
      write_diffusers(exported, folder)
    files.write_json(folder / RECORD, {"format": _FORMAT.value, **exported.record})
  print(output)


def check_output(folder: pathlib.Path) -> None:
  """Raises ValueError if writing to `folder` would destroy anything but an export."""
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--output: expected a folder, found the file {folder}")
  if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
    raise ValueError(
      f"--output: {folder} is not empty and holds no export ({RECORD})\nchoose another folder"
    )


def load() -> Exported:
  """What the flags of `source` name."""
  workdir = source.workdir()
  if workdir is not None:
    found = source.load_run(workdir)
    policy = found.system.policy
    record = {
      "model": found.config["model"],
      "lora": found.config["lora"],
      "iteration": found.step,
      "strength": source.strength(),
    }
    return Exported(found.system, policy.variables(found.params, policy.base), record)
  # How it would be sampled plays no part in what is written.
  process = {"transition": "ddim", "num_steps": 1, "eta": 0.0}
  sys, params = source.load_model(process, {"scale": 1.0})
  return Exported(sys, params, {"model": {"path": source.model_name()}})


def write_lora(exported: Exported, folder: pathlib.Path) -> None:
  """Writes the adapter as the file that diffusers' `load_lora_weights` reads."""
  if "lora" not in exported.variables:
    raise ValueError(
      "--format=lora: expected a run that trains an adapter, with config.lora.rank above 0; this "
      "one has weights of its own\nexport it with --format=diffusers"
    )
  lora_files.write(folder, exported.variables["lora"])


def write_diffusers(exported: Exported, folder: pathlib.Path) -> None:
  """Writes the whole pipeline as a folder, the denoiser's adapter merged into its weights."""
  denoiser = exported.variables["params"]
  if "lora" in exported.variables:
    denoiser = lora.merge(denoiser, exported.variables["lora"])
  model, frozen = exported.system.model, exported.system.frozen
  params = {name: frozen.get(name, tree) for name, tree in model.params.items()}
  model.files.save({**params, "denoiser": denoiser}, folder)


if __name__ == "__main__":
  command.run(main)
