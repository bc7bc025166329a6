"""How strongly an adapter is applied, `alpha / r`, by whatever in or beside its file says alpha."""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign import files
from jaxalign.models.weights import lora_names, tensor_files

_METADATA = "lora_adapter_metadata"  # diffusers' key, in the file's header
# What other tools write there: sglang's and lightx2v's files, PEFT's converters, kohya's scripts.
_HEADER = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
_LARGEST = 1e30  # an alpha beyond it leaves nothing finite in float32
# Where these begin an adapter in PEFT, the base model has lost what it begins with.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Configuration(NamedTuple):
  """What is said of the adapter of a network, in the fields of PEFT's LoraConfig.

  where: that it is said, for messages.
  """

  where: str
  fields: Mapping[str, Any]


def configurations(file: tensor_files.TensorFile) -> dict[str, Configuration]:
  """What was said with the file, by component, "" standing for any that has none of its own.

  Raises ValueError, naming the place and the field, for what cannot be read, an adapter that cannot
  be applied as it is, and places that contradict each other.
  """
  found: dict[str, Configuration] = {}
  for entries in (_of_diffusers(file), _of_peft(file), _of_header(file)):
    for component, entry in entries.items():
      known = found.setdefault(component, entry)
      here, there = known.fields.get("lora_alpha"), entry.fields.get("lora_alpha")
      if None not in (here, there) and here != there:
        raise ValueError(
          f"{file.path}: expected one alpha, found {here:g} ({known.where}) and {there:g} "
          f"({entry.where})\nremove the one that is wrong"
        )
  return found


def alpha(
  configuration: Configuration | None, path: lora_names.Path, rank: int
) -> tuple[float, str]:
  """The alpha that PEFT would give a layer, and what says so; without one the rank, scale 1."""
  if configuration is None:
    return rank, "no alpha given, so alpha = rank"
  where, fields = configuration
  found = fields.get("lora_alpha")
  for pattern, value in fields["alpha_pattern"].items():
    if pattern.fullmatch(lora_names.module_name(path)):  # the first that fits, as in PEFT
      found = value
      break
  if found is None:
    return rank, "no alpha given, so alpha = rank"
  return (found * math.sqrt(rank) if fields["use_rslora"] else found), f"alpha by {where}"


def _of_diffusers(file: tensor_files.TensorFile) -> dict[str, Configuration]:
  if _METADATA not in file.metadata:
    return {}
  try:
    entries = json.loads(file.metadata[_METADATA])
  except (ValueError, RecursionError):
    entries = None
  if not isinstance(entries, dict):
    raise ValueError(f"{file.path}: its {_METADATA} is no JSON object; save it again")
  found: dict[str, dict[str, Any]] = {}
  for name, value in entries.items():
    component, dot, field = name.rpartition(".")
    found.setdefault(component if dot else "", {})[field] = value
  where = f"{_METADATA} in the header"
  return {name: _parse(f"{file.path}: {where}", where, fields) for name, fields in found.items()}


def _of_peft(file: tensor_files.TensorFile) -> dict[str, Configuration]:
  path = file.path.parent / tensor_files.PEFT_CONFIG
  if not path.is_file() or not _is_its_own(file.path):
    return {}
  return {"": _parse(str(path), tensor_files.PEFT_CONFIG, files.read_json(path))}


def _is_its_own(file: pathlib.Path) -> bool:
  """Whether an adapter_config.json beside the file can only be about it."""
  return file.name == tensor_files.PEFT_WEIGHTS or len(list(file.parent.glob("*.safetensors"))) == 1


def _of_header(file: tensor_files.TensorFile) -> dict[str, Configuration]:
  """Alphas that stand in the header by themselves, of one component or of all."""
  found: dict[str, Configuration] = {}
  for key, value in sorted(file.metadata.items()):  # in a file they have no order
    component, _, field = key.rpartition(".")
    if field not in _HEADER or value in ("", "None"):
      continue
    number = _number(f"{file.path}: {key} in the header", value)
    fields = {"lora_alpha": number, "alpha_pattern": {}, "use_rslora": False}
    entry = Configuration(f"{key} in the header", fields)
    known = found.setdefault(component, entry)
    if known.fields["lora_alpha"] != entry.fields["lora_alpha"]:
      raise ValueError(
        f"{file.path}: expected one alpha in the header, found {known.fields['lora_alpha']:g} "
        f"({known.where}) and {entry.fields['lora_alpha']:g} ({entry.where})"
      )
  return found


def _parse(source: str, where: str, fields: Mapping[str, Any]) -> Configuration:
  """The fields that matter, checked: numbers finite, patterns compiled."""
  _check_kind(source, fields)
  patterns, rslora = fields.get("alpha_pattern") or {}, fields.get("use_rslora") or False
  if not isinstance(patterns, Mapping):
    raise ValueError(f"{source}: expected alpha_pattern to be an object, found {patterns!r}")
  if not isinstance(rslora, bool):
    raise ValueError(f"{source}: expected use_rslora to be true or false, found {rslora!r}")
  compiled = {}
  for pattern, value in patterns.items():
    try:
      expression = re.compile(rf"(.*\.)?({pattern})")
    except (re.error, RecursionError, OverflowError) as error:
      raise ValueError(f"{source}: alpha_pattern {pattern!r} is no expression: {error}") from None
    compiled[expression] = _number(f"{source}: alpha_pattern {pattern!r}", value)
  found: dict[str, Any] = {"alpha_pattern": compiled, "use_rslora": rslora}
  if fields.get("lora_alpha") is not None:
    found["lora_alpha"] = _number(f"{source}: lora_alpha", fields["lora_alpha"])
  return Configuration(where, found)


def _check_kind(source: str, fields: Mapping[str, Any]) -> None:
  kind, begun = fields.get("peft_type") or "LORA", fields.get("init_lora_weights")
  if kind != "LORA":
    raise ValueError(f"{source}: expected peft_type LORA, found {kind!r}; only LoRA can be applied")
  if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
    raise ValueError(
      f"{source}: expected an adapter of the model as published, found init_lora_weights "
      f"{begun!r}, which changes the model too\nconvert it with PEFT: save_pretrained(folder, "
      "path_initial_model_for_weight_conversion=...)"
    )


def _number(source: str, value: Any) -> float:
  try:
    number = math.nan if isinstance(value, bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not abs(number) < _LARGEST:  # nor a NaN
    raise ValueError(f"{source}: expected a finite number, found {str(value)[:40]!r}")
  return number
