"""What the tensors of adapter files are called, by whoever wrote them.

  unet.mid_block.attentions.0.proj_in.lora_A.weight                      PEFT, diffusers
  unet.mid_block...attn1.processor.to_out_lora.down.weight               diffusers before 0.22
  text_encoder...self_attn.q_proj.lora_linear_layer.down.weight          the same, text encoders
  lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .alpha      kohya's scripts
  lora_te1.text_model.encoder.layers.0.mlp.fc1.lora_down.weight          OneTrainer
  clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight            OneTrainer, "OMI"
  diffusion_model.middle_block.1.proj_in.lora_up.weight                  ComfyUI
  base_model.model.mid_block.attentions.0.proj_in.lora_A.weight          PEFT's own folders
  mid_block.attentions.0.proj_in.lora_A.default_0.weight                 a PEFT model's own state

Any of them may have the names of wrappers in it (`names.unwrapped`). Layers are compared with
underscores for dots, as kohya's scripts write them and some tools do in part.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxalign.models.weights import names, original

Path = tuple[str, ...]


class Entry(NamedTuple):
  """What a tensor is: `part` "a", "b" or "alpha" of the layer that is called `layer` in a file.

  component: what the beginning of the name says that the layer belongs to; None if it says nothing.
  """

  component: str | None
  layer: str
  part: str


_PARTS = {
  "a": r"lora_A|lora_down|lora\.down|lora_linear_layer\.down",
  "b": r"lora_B|lora_up|lora\.up|lora_linear_layer\.up",
}
_NAMES = {
  # Between the word and "weight" PEFT has the name of the adapter.
  **{
    part: re.compile(rf"(.+?)[._](?:{words})(?:(?:\.[^.]+)?\.weight)?")
    for part, words in _PARTS.items()
  },
  "alpha": re.compile(r"(.+)\.alpha"),
}

# The words that names begin with, and the component that each stands for.
_WORDS = {
  "lora_unet": "unet",
  "unet": "unet",
  "model.diffusion_model": "unet",
  "diffusion_model": "unet",
  "transformer": "transformer",
  "lora_transformer": "transformer",
  "lora_te": "text_encoder",
  "lora_te1": "text_encoder",
  "text_encoder": "text_encoder",
  "clip_l": "text_encoder",
  "text_encoders.clip_l.transformer": "text_encoder",
  "text_encoders.clip_h.transformer": "text_encoder",
  "lora_te2": "text_encoder_2",
  "text_encoder_2": "text_encoder_2",
  "clip_g": "text_encoder_2",
  "text_encoders.clip_g.transformer": "text_encoder_2",
  "text_encoder_3": "text_encoder_3",
}
_PEFT = r"(?:base_model[._](?:model[._])?)*"
_LONGEST_FIRST = "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True))
_BEGINNING = re.compile(rf"{_PEFT}(?:(?:lycoris_)|({_LONGEST_FIRST})[._])?{_PEFT}")

# What adapters that are more than `kernel + a @ b` have in the names of their tensors.
_OTHER_KINDS = {
  "DoRA adapters": r"dora_scale|lora_magnitude_vector",
  "LoHa adapters": r"\.hada_",
  "LoKr adapters": r"\.lokr_",
  "OFT adapters": r"\.oft_|\.boft_",
  "IA3 adapters": r"\.on_input$|\.ia3_",
  "GLoRA adapters": r"\.[ab][12]\.weight$",
  "AdaLoRA adapters": r"\.lora_E\b",
  "LoCon with a middle matrix": r"lora_mid",
  "LoRA with biases": r"\.lora_(B|up)\.([^.]+\.)?bias$",
  "LoRA of embeddings": r"lora_embedding_[AB]",
  "differences of whole weights or biases": r"\.diff(_b)?$",
  "differences of norms": r"\.[wb]_norm$",
  "embeddings of new tokens": r"^bundle_emb\.",
}
# What old files call the projections of a text encoder's attention.
_OLD_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def parse(name: str) -> Entry | None:
  """What the tensor called `name` is, or None if it is no part of an adapter."""
  component, rest = _split(name)
  for part, pattern in _NAMES.items():
    found = pattern.fullmatch(rest)
    if found:
      return Entry(component, _spelling(found[1]), part)
  return None


def other_kind(tensor_names: Iterable[str]) -> tuple[str, str] | None:
  """What a file holds that is not plain LoRA, and the first of its tensors; None if nothing."""
  tensor_names = list(tensor_names)
  for kind, pattern in _OTHER_KINDS.items():
    for name in tensor_names:
      if re.search(pattern, name):
        return kind, name
  return None


def owner(name: str, known: Mapping[str, Path]) -> Path | None:
  """The layer among `known` that a tensor which is no part of an adapter is of, or None."""
  pieces = _split(name)[1].split(".")
  for count in range(len(pieces) - 1, 0, -1):
    found = known.get(_spelling(".".join(pieces[:count])))
    if found is not None:
      return found
  return None


def module_name(path: Sequence[str]) -> str:
  """The PyTorch name of the layer at `path`."""
  return names.torch_name((*path, "kernel")).removesuffix(".weight")


def layer_paths(component: str, paths: Iterable[Path]) -> dict[str, Path]:
  """The path of the layer for everything that `Entry.layer` may be of it."""
  path_of = {module_name(path): path for path in paths}
  found = {alias: path for module, path in path_of.items() for alias in _aliases(module)}
  if component == "unet":  # many have the names of the original checkpoint
    sources = original.unet({f"{module}.weight" for module in path_of})
    for name, source in sources.items():
      alias = _spelling(source.name.removesuffix(".weight"))
      found[alias] = path_of[name.removesuffix(".weight")]
  return found


def module_of_component(component: str, path: Sequence[str]) -> str:
  """What diffusers calls the layer at `path` in an adapter file."""
  return f"{component}.{module_name(path)}"


def _split(name: str) -> tuple[str | None, str]:
  """The component that the beginning of a name says, and the rest of the name."""
  name = names.unwrapped(name)
  beginning = _BEGINNING.match(name)
  assert beginning is not None  # it matches nothing, too
  return _WORDS.get(beginning[1]), names.unwrapped(name[beginning.end() :])


def _spelling(layer: str) -> str:
  return layer.replace(".processor.", ".").replace(".", "_")


def _aliases(module: str) -> set[str]:
  parent, _, last = module.rpartition(".")
  found = {module, module.removeprefix("text_model.")}
  if module.endswith(".to_out.0"):
    found.add(parent)
  if parent.endswith(".self_attn"):
    old = f"{parent}.{_OLD_PROJECTIONS[last]}"
    found |= {old, old.removeprefix("text_model.")}
  return set(map(_spelling, found))
