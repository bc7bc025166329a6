"""What a folder in the diffusers layout holds: its configs, corrected, or why it is not read."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxalign import checks, files
from jaxalign.diffusion import schedulers
from jaxalign.models.identity import classes, fields, legacy
from jaxalign.models.identity.identity import Configs, Identity, Note, changes
from jaxalign.models.weights import tensor_files

SCHEDULER = "scheduler/scheduler_config.json"


def class_name(folder: pathlib.Path) -> str:
  """The class in a folder's model_index.json; "" where there is none."""
  index = folder / classes.INDEX
  return classes.plain_name(files.read_json(index).get("_class_name")) if index.is_file() else ""


def read(folder: pathlib.Path, *, weights: bool = True) -> Identity:
  """What the folder of a Stable Diffusion holds; without `weights` these play no part.

  Raises ValueError, naming the file, for components, fields and inputs that are not known.
  """
  index = classes.read_index(folder)
  components = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if index.two else [])]
  paths = {name: folder / config_file(name) for name in (*components, "scheduler")}
  found = {name: files.read_json(path) for name, path in paths.items()}
  halves = [name for name in components if classes.text_half(found[name]) is not found[name]]
  found = {name: classes.text_half(config) for name, config in found.items()}
  for name in components:
    classes.check_config(paths[name], name, found[name])
  known = fields.COMPONENTS
  configs = {name: fields.clean(known[name], found[name], paths[name]) for name in paths}
  # Of two names it is that of the index which diffusers loads.
  configs["scheduler"]["_class_name"] = index.scheduler
  try:
    schedulers.is_flow(configs["scheduler"])
  except ValueError as error:
    raise ValueError(f"{paths['scheduler']}: {error}") from None
  configs = legacy.correct(configs, classes.PIPELINES[index.pipeline["_class_name"]])
  classes.check_channels(
    paths["unet"], configs["unet"].get("in_channels", 4), configs["unet"].get("out_channels", 4)
  )
  notes = [Note(name, "its text_config is read, of both towers") for name in halves]
  for name in paths:
    notes += told(name, known[name], found[name], configs[name])
  configs["pipeline"] = index.pipeline
  notes += _assumptions(index, configs) + (variants(folder, components) if weights else [])
  return Identity(configs, tuple(notes))


def config_file(component: str) -> str:
  """Where a component's config is in a folder."""
  return SCHEDULER if component == "scheduler" else f"{component}/config.json"


def told(
  component: str, known: fields.Fields, found: Mapping[str, Any], used: Mapping[str, Any]
) -> list[Note]:
  """What there is to say of a config, as it was found and as it is used."""
  unknown = fields.unknown(known, found)
  shown = [f"{checks.cut(field, 60)}={checks.shown(found[field], 40)}" for field in unknown]
  notes = [Note(component, f"unknown {checks.first(shown)}: taken to change nothing")]
  before = {field: value for field, value in found.items() if field not in unknown}
  return (notes if shown else []) + [Note(component, what) for what in changes(before, used)]


def _assumptions(index: classes.Index, configs: Configs) -> list[Note]:
  """What is taken to be so though no file says it, or though most models want it otherwise."""
  found = []
  if index.found != index.pipeline["_class_name"]:
    name, taken = checks.cut(index.found, 60), index.pipeline["_class_name"]
    found.append(Note("pipeline", f"{name} taken for {taken}, by its components"))
  if schedulers.clips(configs["scheduler"]):
    found.append(
      Note("scheduler", "clip_sample stays true: latents are limited, as diffusers does here")
    )
  if configs["unet"].get("sample_size") is None:
    found.append(Note("unet", "no sample_size; the size of images is that of vae/config.json"))
  return found


def variants(folder: pathlib.Path, components: list[str]) -> list[Note]:
  """Which components have only weights of a variant, such as fp16."""
  found = {name: tensor_files.find_other_variant(folder / name) for name in components}
  return [
    Note(name, f"weights of the variant {variant}, the only ones there")
    for name, variant in found.items()
    if variant
  ]
