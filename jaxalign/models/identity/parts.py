"""Folders of flow transformers: the class and config of each part, or why they are not read."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign import checks, files
from jaxalign.diffusion import schedulers
from jaxalign.models.identity import classes, fields, folders
from jaxalign.models.identity.identity import Identity, Note
from jaxalign.models.weights import safetensors_io

# Of model_index.json: how many tokens of a prompt were read in training. Our own; diffusers passes
# over names that begin so.
LENGTH = "_max_sequence_length"
TOKENIZER = None  # in the place of a config's fields, see `Part`
# Present in some folders, and without a part in sampling from text.
_WITHOUT_PART = ("feature_extractor", "image_encoder", "safety_checker")


class Part(NamedTuple):
  """A component of a pipeline.

  classes: that it may have in model_index.json, the first one when it is written.
  fields: of its config; `TOKENIZER` for a tokenizer's folder.
  library: that the classes are of.
  optional: whether the model is whole without it.
  own: see `safetensors_io.open_component`.
  copied: it is never changed, and written as it was found.
  """

  classes: tuple[str, ...]
  fields: fields.Fields | None
  library: str = "diffusers"
  optional: bool = False
  own: safetensors_io.OwnTensors | None = None
  copied: bool = False


class Kind(NamedTuple):
  """A kind of pipeline: what it is called, diffusers' classes of it, and its parts by name.

  unused: what diffusers' class has beside them, and does without.
  """

  name: str
  pipelines: tuple[str, ...]
  parts: Mapping[str, Part]
  unused: tuple[str, ...] = ()


def read(folder: pathlib.Path, kind: Kind, *, weights: bool = True) -> Identity:
  """The configs of a folder of this kind; without `weights` these play no part.

  `configs["pipeline"]` holds the classes and the settings of model_index.json.

  Raises ValueError, naming the file, for parts, classes and fields that are not known.
  """
  file = folder / classes.INDEX
  index = files.read_json(file)
  entries = _entries(file, index, kind)
  configs: dict[str, dict[str, Any]] = {}
  notes: list[Note] = []
  for name, part in kind.parts.items():
    if name not in entries or part.fields is TOKENIZER:
      continue
    path = folder / folders.config_file(name)
    whole = files.read_json(path)
    found = classes.text_half(whole)
    if whole.get("quantization_config"):  # it is beside text_config
      found = {**found, "quantization_config": whole["quantization_config"]}
    _check_class(path, name, part, found)
    configs[name] = fields.clean(part.fields, found, path)
    notes += folders.told(name, part.fields, found, configs[name])
  configs["scheduler"]["_class_name"] = entries["scheduler"]
  if not _is_flow(folder, configs["scheduler"]):
    raise ValueError(
      f"{folder / folders.SCHEDULER}: expected the scheduler of a rectified flow "
      f"(FlowMatchEulerDiscreteScheduler), found {entries['scheduler']}"
    )
  settings = {
    name: value
    for name, value in index.items()
    if (name in kind.parts or not isinstance(value, list)) and not name.startswith("_")
  }
  own = {LENGTH: index[LENGTH]} if LENGTH in index else {}
  configs["pipeline"] = {**settings, **own, "_class_name": folders.class_name(folder)}
  absent = [name for name, part in kind.parts.items() if part.optional and name not in entries]
  notes += [Note("pipeline", f"no {checks.first(absent)}")] if absent else []
  return Identity(configs, (*notes, *(folders.variants(folder, list(configs)) if weights else ())))


def _entries(file: pathlib.Path, index: Mapping[str, Any], kind: Kind) -> dict[str, str]:
  """The class of each part that a model_index.json names."""
  entries = {
    name: classes.plain_name(entry)
    for name, entry in index.items()
    if isinstance(entry, list) and any(entry) and not name.startswith("_")
  }
  needed = [name for name, part in kind.parts.items() if not part.optional]
  missing = sorted(set(needed) - entries.keys())
  foreign = sorted(entries.keys() - {*kind.parts, *_WITHOUT_PART})
  if missing or foreign:
    raise ValueError(
      f"{file}: expected the parts of {kind.name}, found one "
      + (f"without {checks.first(missing)}" if missing else f"with {checks.first(foreign)}")
    )
  for name, part in kind.parts.items():
    if name in entries and name != "scheduler" and entries[name] not in part.classes:
      raise classes.other_network(file, name, part.classes[0], entries[name])
  return entries


def _check_class(
  path: pathlib.Path, name: str, part: Part, config: Mapping[str, Any]
) -> None:
  """Raises ValueError if a config names another class than its part has."""
  architectures = config.get("architectures")
  first = architectures[0] if isinstance(architectures, list) and architectures else ""
  for found in (config.get("_class_name", ""), str(first)):
    found = classes.plain_name(found)
    # Of CLIP's own names a file has now this one, now that one.
    both_clip = found.startswith("CLIP") and part.classes[0].startswith("CLIP")
    if name != "scheduler" and found and found not in part.classes and not both_clip:
      raise classes.other_network(path, name, part.classes[0], found)


def _is_flow(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
  try:
    return schedulers.is_flow(config)
  except ValueError as error:
    raise ValueError(f"{folder / folders.SCHEDULER}: {error}") from None


def index(kind: Kind, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The content of model_index.json for a model of this kind with these configs."""
  entries: dict[str, Any] = {
    name: [part.library, part.classes[0]] if _is_there(name, configs) else [None, None]
    for name, part in kind.parts.items()
  }
  entries["scheduler"] = ["diffusers", configs["scheduler"]["_class_name"]]
  entries |= {name: [None, None] for name in kind.unused}
  return dict(sorted({**entries, **configs["pipeline"], "_diffusers_version": "0.30.0"}.items()))


def _is_there(name: str, configs: Mapping[str, Any]) -> bool:
  return name.replace("tokenizer", "text_encoder") in configs
