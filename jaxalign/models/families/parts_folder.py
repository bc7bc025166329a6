"""Opens and saves the folder of a flow transformer, part by part."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign import files
from jaxalign.models import tokenization
from jaxalign.models.identity import classes, folders, parts
from jaxalign.models.weights import safetensors_io
from jaxalign.types import Params

_DENOISER = "transformer"


def here(component: str) -> str:
  """What `models.model.Model.params` calls a component of a folder."""
  return "denoiser" if component == _DENOISER else component


def open_params(
  folder: str | os.PathLike, shapes: Mapping[str, Params]
) -> dict[str, Params]:
  """The parameters of each component, by its name in the folder; lazy until they are placed."""
  found = {}
  for name, tree in shapes.items():
    path, others = pathlib.Path(folder) / name, name.startswith("text_encoder")
    found[name] = safetensors_io.open_component(path, tree, others=others)
  return found


def save(
  kind: parts.Kind,
  configs: Mapping[str, Mapping[str, Any]],
  source: str | os.PathLike,
  params: Mapping[str, Params],
  folder: str | os.PathLike,
) -> None:
  """Writes a folder that diffusers reads; configs as corrected, tokenizers as found in `source`.

  Raises ValueError for a component without parameters.
  """
  source, folder = pathlib.Path(source), pathlib.Path(folder)
  components = [name for name in kind.parts if name in configs and name != "scheduler"]
  missing = sorted(name for name in components if here(name) not in params)
  if missing:
    raise ValueError(f"expected params of {components}, found none of {missing}")
  for name in components:
    filename = safetensors_io.TEXT_WEIGHTS if "text" in name else safetensors_io.WEIGHTS
    safetensors_io.write_component(folder / name, params[here(name)], configs[name], filename)
  for name, part in kind.parts.items():
    if part.kind is parts.TOKENIZER and name.replace("tokenizer", "text_encoder") in configs:
      of = "CLIP" if part.classes[0].startswith("CLIP") else "T5"
      tokenization.copy(source / name, folder / name, of)
  scheduler = folder / folders.SCHEDULER
  scheduler.parent.mkdir(exist_ok=True)
  files.write_json(scheduler, configs["scheduler"])
  files.write_json(folder / classes.INDEX, parts.index(kind, configs))  # last: loading begins there
