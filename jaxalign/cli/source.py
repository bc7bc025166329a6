"""The flags that say what a command samples: a model, alone or with adapters, or a run."""

import dataclasses
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

_MODEL = flags.DEFINE_string(
  "model", None, "shapes, a diffusers folder, a hub id, or a single .safetensors file."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "With --model: folder or hub id of a tokenizer, which a single file has not."
)
_CONFIGS = flags.DEFINE_string(
  "configs", "", "With a single file as --model: folder or hub id of the model with its configs."
)
_LORA = flags.DEFINE_string(
  "lora", None, "With --model: adapters, a file, its folder, or a hub id: owner/name[/FILE]."
)
_WORKDIR = paths.define("workdir", None, "A run, instead of --model.")
_BEST = flags.DEFINE_bool(
  "best", False, "With --workdir: what a guard has kept, though it did not end the run."
)
_NEWEST = flags.DEFINE_bool(
  "newest", False, "With --workdir: the newest checkpoint, though a guard ended with another."
)
_STRENGTH = flags.DEFINE_float(
  "strength",
  1.0,
  "With --workdir or --lora: how much of the training or the adapters is applied; 0 is the base.",
)


command.must_be_finite("strength")


def workdir() -> pathlib.Path | None:
  """The run that is named, or None if a model is; flags.Error unless it is one of both."""
  if (_MODEL.value is None) == (_WORKDIR.value is None):
    raise flags.Error("expected one of --model and --workdir")
  for flag in (_BEST, _NEWEST):
    if _WORKDIR.value is None and flag.value:
      raise flags.Error(f"--{flag.name}: expected --workdir=RUN with it")
  if _BEST.value and _NEWEST.value:
    raise flags.Error("expected one of --best and --newest")
  for name in ("lora", "tokenizer", "configs"):
    if _WORKDIR.value is not None and flags.FLAGS[name].present:
      raise flags.Error(f"--{name}: expected --model with it; the config of a run says its own")
  if _WORKDIR.value is None and _LORA.value is None and _STRENGTH.present:
    raise flags.Error("--strength: expected --workdir or --lora with it; a model has none")
  return _WORKDIR.value


def model_name() -> str:
  """The value of --model."""
  return _MODEL.value or ""


def strength() -> float:
  """The value of --strength."""
  return _STRENGTH.value


def load_run(workdir: pathlib.Path, **overrides: Mapping[str, Any]) -> workdir_lib.Run:
  """The run of `workdir` as the other flags want it; `process` and `guidance` as in `run.load`.

  Says which of its states that is.
  """
  take = "best" if _BEST.value else "newest" if _NEWEST.value else "chosen"
  found = workdir_lib.load(workdir, take=take, strength=_STRENGTH.value, **overrides)
  print(f"{workdir}: {found.taken}")
  return found


def load_model(
  process: Mapping[str, Any], guidance: Mapping[str, Any]
) -> tuple[system.System, Params]:
  """The system of --model, and the parameters to sample with, which have the adapters of --lora.

  Adapters of text encoders are merged into the system's own.
  """
  loaded = system.make_system(
    seed=0,
    model={"path": _MODEL.value, **_given(tokenizer=_TOKENIZER.value, configs=_CONFIGS.value)},
    lora=system.NO_LORA,
    process=process,
    guidance=guidance,
  )
  params = loaded.policy.params
  if _LORA.value is None:
    return loaded, params
  adapted = loaded.model.files.adapted
  if not adapted:
    raise ValueError("--lora: expected a model that other tools have adapters for, this has none")
  networks = {
    name: params["params"] if component == "denoiser" else loaded.frozen[component]
    for component, name in adapted.items()
  }
  file = lora_files.read(hub.find_adapter(_LORA.value), networks)
  print(f"--lora: {file.in_words()}", file=sys.stderr)
  if file.unused:
    message = f"--lora: {len(file.unused)} tensors fit no layer and are not used, such as"
    print(message, checks.first(file.unused), file=sys.stderr)
  adapters = file.at_strength(_STRENGTH.value)
  networks |= {name: lora.merge(networks[name], adapter) for name, adapter in adapters.items()}
  merged = {component: networks[name] for component, name in adapted.items()}
  params = {"params": merged.pop("denoiser")}
  return dataclasses.replace(loaded, frozen={**loaded.frozen, **merged}), params


def _given(**options: str) -> dict[str, str]:
  """The options that were given: a family takes those that it knows."""
  return {name: value for name, value in options.items() if value}
