"""The flags that say what a command samples: a model, alone or with adapters, or a run."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from jaxalign import checks, system
from jaxalign.cli import command, paths
from jaxalign.models.adapters import lora
from jaxalign.models.weights import hub, lora_files
from jaxalign.training import workdir as workdir_lib
from jaxalign.types import Params


def define(values: flags.FlagValues) -> None:
  """Defines the flags."""
  define_string = functools.partial(flags.DEFINE_string, flag_values=values)
  define_bool = functools.partial(flags.DEFINE_bool, flag_values=values)
  define_string("model", None, "shapes, a diffusers folder, a hub id, or a .safetensors file.")
  define_string(
    "tokenizer", "", "With --model: folder or hub id of a tokenizer, which a single file has not."
  )
  define_string(
    "configs", "", "With a single file as --model: folder or hub id of the model with its configs."
  )
  define_string(
    "lora", None, "With --model: adapters, a file, its folder, or a hub id: owner/name[/FILE]."
  )
  paths.define("workdir", None, "A run, instead of --model.", flag_values=values)
  define_bool(
    "best", False, "With --workdir: what a guard has kept, though it did not end the run."
  )
  define_bool(
    "newest", False, "With --workdir: the newest checkpoint, though a guard ended with another."
  )
  flags.DEFINE_float(
    "strength",
    1.0,
    "With --workdir or --lora: how much of the training or the adapters is applied; 0 is the base.",
    flag_values=values,
  )
  command.must_be_finite(values, "strength")


def workdir(values: flags.FlagValues) -> pathlib.Path | None:
  """The run that is named, or None if a model is; flags.Error unless it is one of both."""
  if (values.model is None) == (values.workdir is None):
    raise flags.Error("expected one of --model and --workdir")
  for name in ("best", "newest"):
    if values.workdir is None and values[name].value:
      raise flags.Error(f"--{name}: expected --workdir=RUN with it")
  if values.best and values.newest:
    raise flags.Error("expected one of --best and --newest")
  for name in ("lora", "tokenizer", "configs"):
    if values.workdir is not None and values[name].present:
      raise flags.Error(f"--{name}: expected --model with it; the config of a run says its own")
  if values.workdir is None and values.lora is None and values["strength"].present:
    raise flags.Error("--strength: expected --workdir or --lora with it; a model has none")
  return values.workdir


def state(values: flags.FlagValues) -> dict[str, Any]:
  """Which state of a run the flags name: `take` and `strength` of `training.workdir.load`."""
  take = "best" if values.best else "newest" if values.newest else "chosen"
  return {"take": take, "strength": values.strength}


def load_run(values: flags.FlagValues, **overrides: Mapping[str, Any]) -> workdir_lib.Run:
  """The run of --workdir as the other flags want it; `process` and `guidance` as in `run.load`.

  Says which of its states that is.
  """
  found = workdir_lib.load(values.workdir, **state(values), **overrides)
  print(f"{values.workdir}: {found.taken}")
  return found


def load_model(
  values: flags.FlagValues, process: Mapping[str, Any], guidance: Mapping[str, Any]
) -> tuple[system.System, Params]:
  """The system of --model, and the parameters to sample with, which have the adapters of --lora.

  Adapters of text encoders are merged into the system's own.
  """
  loaded = system.make_system(
    seed=0,
    model={"path": values.model, **_given(tokenizer=values.tokenizer, configs=values.configs)},
    lora=system.NO_LORA,
    process=process,
    guidance=guidance,
  )
  params = loaded.policy.params
  if values.lora is None:
    return loaded, params
  adapted = loaded.model.files.adapted
  if not adapted:
    raise ValueError("--lora: expected a model that other tools have adapters for, this has none")
  networks = {
    name: params["params"] if component == "denoiser" else loaded.frozen[component]
    for component, name in adapted.items()
  }
  file = lora_files.read(hub.find_adapter(values.lora), networks)
  print(f"--lora: {file.in_words()}", file=sys.stderr)
  if file.unused:
    message = f"--lora: {len(file.unused)} tensors fit no layer and are not used, such as"
    print(message, checks.first(file.unused), file=sys.stderr)
  adapters = file.at_strength(values.strength)
  networks |= {name: lora.merge(networks[name], adapter) for name, adapter in adapters.items()}
  merged = {component: networks[name] for component, name in adapted.items()}
  params = {"params": merged.pop("denoiser")}
  return dataclasses.replace(loaded, frozen={**loaded.frozen, **merged}), params


def _given(**options: str) -> dict[str, str]:
  """The options that were given: a family takes those that it knows."""
  return {name: value for name, value in options.items() if value}
