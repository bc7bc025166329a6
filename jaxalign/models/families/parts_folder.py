"""Opens and saves the folder of a flow transformer, part by part."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign import files
from jaxalign.models import tokenization
from jaxalign.models.identity import classes, folders, parts
from jaxalign.models.weights import flow_file, safetensors_io, tensor_files
from jaxalign.types import Params

_DENOISER = "transformer"


def here(component: str) -> str:
  """What `models.model.Model.params` calls a component of a folder."""
  return "denoiser" if component == _DENOISER else component


def open_params(
  kind: parts.Kind,
  folder: str | os.PathLike,
  shapes: Mapping[str, Params],
  configs: Mapping[str, Mapping[str, Any]],
  file: flow_file.FlowFile | None = None,
) -> dict[str, Params]:
  """The parameters of each component, by its name in the folder; lazy until they are placed.

  Those that a `file` has are taken from there.
  """
  found, held = {}, file.components() if file else ()
  for name, tree in shapes.items():
    if file is not None and name in held:
      found[name] = file.component(name, tree)
      continue
    own = kind.parts[name].own
    own = own and functools.partial(own, config=configs[name])
    options = {"others": name.startswith("text_encoder"), "own": own}
    found[name] = safetensors_io.open_component(pathlib.Path(folder) / name, tree, **options)
  return found


def save(
  kind: parts.Kind,
  configs: Mapping[str, Mapping[str, Any]],
  source: str | os.PathLike,
  params: Mapping[str, Params],
  folder: str | os.PathLike,
) -> None:
  """Writes a folder that diffusers reads; configs as corrected, tokenizers as found in `source`.

  So are parts that are never changed, in whatever precision they are there.
  Raises ValueError for a component without parameters.
  """
  source, folder = pathlib.Path(source), pathlib.Path(folder)
  copied = [name for name, part in kind.parts.items() if part.copied]
  components = [
    name for name in kind.parts if name in configs and name not in ("scheduler", *copied)
  ]
  missing = sorted(name for name in components if here(name) not in params)
  if missing:
    raise ValueError(f"expected params of {components}, found none of {missing}")
  for name in components:
    filename = safetensors_io.TEXT_WEIGHTS if "text" in name else safetensors_io.WEIGHTS
    safetensors_io.write_component(folder / name, params[here(name)], configs[name], filename)
  for name in copied:
    tensor_files.copy_component(source / name, folder / name)
  for name, part in kind.parts.items():
    if part.fields is parts.TOKENIZER and name.replace("tokenizer", "text_encoder") in configs:
      kinds = [kind for kind in ("CLIP", "T5") if part.classes[0].startswith(kind)]
      of = kinds[0] if kinds else tokenization.LANGUAGE_MODEL
      tokenization.copy(source / name, folder / name, of)
  scheduler = folder / folders.SCHEDULER
  scheduler.parent.mkdir(exist_ok=True)
  files.write_json(scheduler, configs["scheduler"])
  files.write_json(folder / classes.INDEX, parts.index(kind, configs))  # last: loading begins there
