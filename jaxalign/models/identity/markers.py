"""What a single file says of itself: marker tensors, and words in the header of safetensors.

The markers are those that other readers go by: ComfyUI and AUTOMATIC1111's web UI the tensors,
ModelSpec (github.com/Stability-AI/ModelSpec), ComfyUI and kohya's scripts the words.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign import checks
from jaxalign.models.identity import classes
from jaxalign.models.identity.identity import Configs, Identity, Note
from jaxalign.models.weights import tensor_files

Field = tuple[str, str]  # component and field
PREDICTION: Field = ("scheduler", "prediction_type")
ZERO_SNR: Field = ("scheduler", "rescale_betas_zero_snr")
SIZE: Field = ("unet", "sample_size")
_EPSILON, _VELOCITY = {PREDICTION: "epsilon"}, {PREDICTION: "v_prediction"}

_TENSORS: dict[str, Mapping[Field, Any]] = {"v_pred": _VELOCITY, "ztsnr": {ZERO_SNR: True}}
_PREDICTIONS = {
  "epsilon": _EPSILON,
  "eps": _EPSILON,
  "v": _VELOCITY,
  "v_prediction": _VELOCITY,
  "v-prediction": _VELOCITY,
}
# What the values of a word in the header mean, by the word; the first that says a field is taken.
_WORDS: dict[str, Mapping[str, Mapping[Field, Any]]] = {
  "modelspec.prediction_type": _PREDICTIONS,
  "modelspec.predict_key": _PREDICTIONS,
  "ss_v_parameterization": {"true": _VELOCITY, "false": {}, "none": {}},
  "ss_zero_terminal_snr": {"true": {ZERO_SNR: True}, "false": {}, "none": {}},
}
_ARCHITECTURE, _RESOLUTION = "modelspec.architecture", "modelspec.resolution"
_ARCHITECTURES: dict[str, tuple[str, Mapping[Field, Any]]] = {
  "stable-diffusion-v1": ("1.x", {}),
  "stable-diffusion-v2-512": ("2.x", {**_EPSILON, SIZE: 64}),
  "stable-diffusion-v2-768-v": ("2.x", {**_VELOCITY, SIZE: 96}),
  "stable-diffusion-xl-v1-base": ("xl", {}),
}
# Beginnings of tensors' names that tell a model of another kind, which no kind of ours has.
_OTHER_KINDS = {
  "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
  "model.diffusion_model.joint_blocks.": "a part of a Stable Diffusion 3",
  "joint_blocks.": "a part of a Stable Diffusion 3",
  "model.diffusion_model.double_blocks.": "a FLUX of another kind",
  "double_blocks.": "a FLUX of another kind",
}
# Beginnings of tensors' names that mean another process than we sample.
_OTHER_MODELS = {
  "edm_mean": "latents normalised by edm_mean and edm_std (Playground 2.5)",
  "edm_vpred.": "velocities on the noise levels of EDM (CosXL)",
}
_LATENT_CHANNELS = 4
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
# A norm whose biases spread further in the 2.x that predict velocities; by it ComfyUI tells them.
_TELLING_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TELLING_SPREAD = 0.09

# What a config says that does not mention the field.
_ABSENT = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "in_channels": 4}
# The pipeline of a UNet that reads the latents of an image to edit too.
_EDITS_IMAGES = {
  "1.x": {
    "_class_name": "StableDiffusionInstructPix2PixPipeline",
    "requires_safety_checker": False,
  },
  "xl": {
    "_class_name": "StableDiffusionXLInstructPix2PixPipeline",
    "force_zeros_for_empty_prompt": True,
  },
}


class Said(NamedTuple):
  """What a file says.

  fields: `{(component, field): (value, who says it)}`.
  against: words that contradict what was taken, or that nobody here knows.
  unknown: of these, what has to be decided before the model is used.
  """

  fields: dict[Field, tuple[Any, str]]
  against: tuple[str, ...]
  unknown: tuple[str, ...]


def read(file: tensor_files.TensorFile, kind: str) -> Said:
  """What the file of a kind ("1.x", "2.x" or "xl") says of itself.

  Raises ValueError for what marks a model or weights that are not supported.
  """
  _check_supported(file)
  fields: dict[Field, tuple[Any, str]] = {}
  against: list[str] = []
  unknown: list[str] = []

  def take(meaning: Mapping[Field, Any], source: str) -> None:
    for field, value in meaning.items():
      taken, by = fields.setdefault(field, (value, source))
      if taken != value:
        against.append(f"{source} says {field[1]} {_word(value)}; {_word(taken)} is taken, by {by}")

  for tensor, meaning in _TENSORS.items():
    if tensor in file.tensors:
      take(meaning, f"tensor {tensor}")
  for word, meanings in _WORDS.items():
    value = file.metadata.get(word, "").strip()
    if value.lower() in meanings:
      take(meanings[value.lower()], word)
    elif value:
      unknown.append(f"{word}={checks.shown(value, 40)}")
  if _RESOLUTION in file.metadata:
    take(_size(file.metadata[_RESOLUTION]), _RESOLUTION)
  architecture = _architecture(file)
  if architecture:
    if _ARCHITECTURES.get(architecture, ("",))[0] == kind:
      take(_ARCHITECTURES[architecture][1], _ARCHITECTURE)
    else:
      shown = checks.cut(architecture, 50)
      against.append(f"{_ARCHITECTURE} says {shown}, the tensors are those of {kind}")
  if _channels(file) != _LATENT_CHANNELS:
    take({("unet", "in_channels"): _channels(file)}, "its first convolution")
  if kind == "2.x" and PREDICTION not in fields and _TELLING_NORM in file.tensors:
    spread = float(np.std(np.asarray(file.tensors[_TELLING_NORM])))
    take(_VELOCITY if spread > _TELLING_SPREAD else _EPSILON, "the spread of its last norm")
  return Said(fields, tuple(against), tuple(unknown))


def other_kind(file: tensor_files.TensorFile) -> str:
  """The name of a model that is not whole by our kinds; "" for what is not known."""
  for beginning, name in _OTHER_KINDS.items():
    if any(tensor.startswith(beginning) for tensor in file.tensors):
      return name
  return ""


def _check_supported(file: tensor_files.TensorFile) -> None:
  tensor_files.check_unscaled(file)
  for name in file.tensors:
    for beginning, what in _OTHER_MODELS.items():
      if name.startswith(beginning):
        raise ValueError(
          f"{file.path}: expected a Stable Diffusion as published, found the tensor {name}, which "
          f"marks {what}\nsuch a model is not supported"
        )
  architecture = _architecture(file)
  others = ("refiner", "inpainting", "unclip", "depth", "edit")
  other = next((word for word in others if word in architecture), None)
  if other is not None:
    raise ValueError(
      f"{file.path}: expected a text-to-image model, found {_ARCHITECTURE} "
      f"{checks.shown(architecture)} in its header\na model for {other} is not supported"
    )
  classes.check_channels(file.path, _channels(file), _LATENT_CHANNELS)


def _architecture(file: tensor_files.TensorFile) -> str:
  """ModelSpec's word for the kind, without what follows it in an adapter's header."""
  return file.metadata.get(_ARCHITECTURE, "").split("/")[0].strip().lower()


def _channels(file: tensor_files.TensorFile) -> int:
  """How many channels the UNet reads, by its first convolution."""
  conv_in = file.tensors.get(_CONV_IN)
  return _LATENT_CHANNELS if conv_in is None or conv_in.ndim != 4 else conv_in.shape[1]


def _size(resolution: str) -> Mapping[Field, Any]:
  """The size of latents by "WIDTHxHEIGHT", or nothing where it is no such word."""
  sides = re.fullmatch(r"(\d{2,4})x(\d{2,4})", resolution.strip())
  if sides is None or int(sides[1]) % 8 or int(sides[2]) % 8:
    return {}
  width, height = int(sides[1]) // 8, int(sides[2]) // 8
  return {SIZE: width if width == height else [height, width]}


def _word(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def configure(path: Any, kind: str, said: Said, published: Configs) -> Identity:
  """The published configs of a kind, with what the file says of itself.

  Raises ValueError for a word on the prediction that is not known.
  """
  if said.unknown:
    raise ValueError(
      f"{path}: expected a known word in its header, found {checks.first(said.unknown)}\n"
      "name a model with the right configs (config.model.configs, --configs)"
    )
  fields = {field: value for field, (value, _) in said.fields.items()}
  assumed, against = PREDICTION not in fields, list(said.against)
  if fields.get(ZERO_SNR) and fields.get(PREDICTION) != "v_prediction":
    # Of noise there is nothing to predict where nothing but noise is left; readers ignore it too.
    del fields[ZERO_SNR]
    against.append(f"{said.fields[ZERO_SNR][1]} is left aside, which needs v_prediction")
  if kind == "2.x" and fields.get(PREDICTION) == "epsilon":
    fields.setdefault(SIZE, 64)  # as 2-base and 2.1-base; 2 and 2.1 predict velocities
  configs = {name: dict(config) for name, config in published.items()}
  for (component, field), value in fields.items():
    configs[component][field] = value
  if "in_channels" in {field for _, field in fields}:
    configs["pipeline"] = dict(_EDITS_IMAGES["xl" if kind == "xl" else "1.x"])
  notes = [Note("model", f"Stable Diffusion {kind} with the published configs (--configs: others)")]
  words = [
    f"{field} {_word(value)} by {said.fields[of, field][1]}"
    for (of, field), value in fields.items()
    if (of, field) in said.fields and not (field == SIZE[1] and published[of][field] == value)
  ]
  prediction = configs["scheduler"].get("prediction_type", "epsilon")
  if assumed:
    words.append(f"prediction_type {prediction}, of which the file says nothing")
  notes += [Note("file", word) for word in words]
  notes += [Note("contradiction", word) for word in against]
  return Identity(configs, tuple(notes))


def compare(path: Any, kind: str, said: Said, named: Identity) -> Identity:
  """The configs that the user named, and in what the file contradicts them.

  Raises ValueError if they are those of another kind.
  """
  two = "text_encoder_2" in named.configs
  if two != (kind == "xl"):
    raise ValueError(
      f"{path}: expected configs of a Stable Diffusion {kind}, found those of "
      f"{'an XL' if two else 'a 1.x or 2.x'}\nname another model (config.model.configs, --configs)"
    )
  against = list(said.against)
  for (component, field), (value, source) in said.fields.items():
    own = named.configs[component].get(field, _ABSENT.get(field))
    if own != value and field != "sample_size":  # the size is the user's to choose
      against.append(
        f"{source} says {field} {_word(value)}; {_word(own)} is taken, as the named configs say"
      )
  notes = [Note("contradiction", word) for word in (*against, *said.unknown)]
  return Identity(named.configs, (*named.notes, *notes))
