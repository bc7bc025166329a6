"""What the tensors of adapter files are called, by whoever wrote them.

  unet.mid_block.attentions.0.proj_in.lora_A.weight                      PEFT, diffusers
  unet.mid_block...attn1.processor.to_out_lora.down.weight               diffusers before 0.22
  text_encoder...self_attn.q_proj.lora_linear_layer.down.weight          the same, text encoders
  lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .alpha      kohya's scripts
  base_model.model.mid_block.attentions.0.proj_in.lora_A.weight          PEFT's own folders
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxalign.models.weights import names, original

Path = tuple[str, ...]


class Entry(NamedTuple):
  """What a tensor is: `part` "a", "b" or "alpha" of the layer that is called `layer` in a file."""

  component: str
  layer: str
  part: str


_PARTS = {
  "a": r"lora_A|lora_down|lora\.down|lora_linear_layer\.down",
  "b": r"lora_B|lora_up|lora\.up|lora_linear_layer\.up",
}
_NAMES = {
  **{part: re.compile(rf"(.+?)[._](?:{words})\.weight") for part, words in _PARTS.items()},
  "alpha": re.compile(r"(.+)\.alpha"),
}

# The beginnings of names, and the component that each stands for; the first that fits.
_PREFIXES = (
  ("base_model.model.", "unet"),
  ("unet.", "unet"),
  ("text_encoder.", "text_encoder"),
  ("text_encoder_2.", "text_encoder_2"),
  ("lora_unet_", "unet"),
  ("lora_te_", "text_encoder"),
  ("lora_te1_", "text_encoder"),
  ("lora_te2_", "text_encoder_2"),
)
# Adapters that compute something else than `kernel + a @ b`, by what their names have in them.
_OTHER_KINDS = {
  "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
  "LoHa": re.compile(r"\.hada_"),
  "LoKr": re.compile(r"\.lokr_"),
  "LoCon with a middle matrix": re.compile(r"lora_mid"),
  "LoRA with biases": re.compile(r"lora_B\.bias"),
}
# What old files call the projections of a text encoder's attention.
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def parse(name: str) -> Entry | None:
  """What the tensor called `name` is, or None if it is no part of an adapter."""
  component, rest = "unet", name
  for prefix, owner in _PREFIXES:
    if name.startswith(prefix):
      component, rest = owner, name.removeprefix(prefix)
      break
  for part, pattern in _NAMES.items():
    found = pattern.fullmatch(rest)
    if found:
      return Entry(component, found[1].replace(".processor.", "."), part)
  return None


def other_kind(tensor_names: Iterable[str]) -> str | None:
  """The kind of adapter in a file, if it is one that is not plain LoRA."""
  for kind, pattern in _OTHER_KINDS.items():
    if any(pattern.search(name) for name in tensor_names):
      return kind
  return None


def module_name(path: Sequence[str]) -> str:
  """The PyTorch name of the layer at `path`."""
  return names.torch_name((*path, "kernel")).removesuffix(".weight")


def layer_paths(component: str, paths: Iterable[Path]) -> dict[str, Path]:
  """The path of the layer for everything that a file may call it."""
  path_of = {module_name(path): path for path in paths}
  found = {alias: path for module, path in path_of.items() for alias in _aliases(module)}
  if component == "unet":  # for XL, kohya's scripts have the names of the original checkpoint
    sources = original.unet({f"{module}.weight" for module in path_of})
    for name, source in sources.items():
      alias = source.name.removesuffix(".weight").replace(".", "_")
      found[alias] = path_of[name.removesuffix(".weight")]
  return found


def _aliases(module: str) -> set[str]:
  parent, _, last = module.rpartition(".")
  found = {module, module.removeprefix("text_model.")}
  if module.endswith(".to_out.0"):
    found.add(parent)
  if parent.endswith(".self_attn"):
    old = f"{parent}.{_OLD_PROJECTIONS[last]}"
    found |= {old, old.removeprefix("text_model.")}
  # kohya's scripts join all of a name with underscores, so a dot cannot be told from one.
  return found | {module.replace(".", "_")}


def module_of_component(component: str, path: Sequence[str]) -> str:
  """What diffusers calls the layer at `path` in an adapter file."""
  return f"{component}.{module_name(path)}"
