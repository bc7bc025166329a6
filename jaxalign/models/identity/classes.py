"""Class names: which pipeline a folder holds, and whether each component is the network we know."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign import checks, files

INDEX = "model_index.json"
ALWAYS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")  # Stable Diffusion XL has both
# Present beside these in many folders, and without a part in sampling from text.
_WITHOUT_PART = ("safety_checker", "feature_extractor", "image_encoder")

_STANDARD = {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"}  # by `two`
_ALL = ("steps_offset", "clip_sample", "sample_size")
_UNCLIPPED = ("steps_offset", "skip_prk_steps", "sample_size")
# diffusers' pipelines of these components, and what each corrects in old configs (`legacy`).
PIPELINES: dict[str, tuple[str, ...]] = {
  "StableDiffusionPipeline": _ALL,
  "StableDiffusionImg2ImgPipeline": _ALL,
  "StableDiffusionInpaintPipelineLegacy": _ALL,
  "StableDiffusionPAGPipeline": _ALL,
  "StableDiffusionPAGImg2ImgPipeline": _ALL,
  "StableDiffusionPAGInpaintPipeline": _ALL,
  "StableDiffusionPipelineSafe": _ALL,
  "LEditsPPPipelineStableDiffusion": _ALL,
  "StableDiffusionInpaintPipeline": _UNCLIPPED,
  "StableDiffusionDiffEditPipeline": _UNCLIPPED,
  "CycleDiffusionPipeline": ("steps_offset", "sample_size"),
  "LatentConsistencyModelPipeline": (),
  "LatentConsistencyModelImg2ImgPipeline": (),
  "StableDiffusionAttendAndExcitePipeline": (),
  "StableDiffusionInstructPix2PixPipeline": (),
  "StableDiffusionModelEditingPipeline": (),
  "StableDiffusionPanoramaPipeline": (),
  "StableDiffusionParadigmsPipeline": (),
  "StableDiffusionSAGPipeline": (),
  "StableDiffusionXLPipeline": (),
  "StableDiffusionXLImg2ImgPipeline": (),
  "StableDiffusionXLInpaintPipeline": (),
  "StableDiffusionXLInstructPix2PixPipeline": (),
  "StableDiffusionXLPAGPipeline": (),
  "StableDiffusionXLPAGImg2ImgPipeline": (),
  "StableDiffusionXLPAGInpaintPipeline": (),
  "LEditsPPPipelineStableDiffusionXL": (),
}
# Those of flow transformers that sample from text, by family.
FLOWS = {
  "sd3": (
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusion3PAGImg2ImgPipeline",
  ),
  "flux1": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
  "flux2": ("Flux2Pipeline", "Flux2KleinPipeline"),
  "z_image": ("ZImagePipeline", "ZImageImg2ImgPipeline"),
  "qwen_image": ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
}

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
COMPONENTS = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "text_encoder": ("CLIPTextModel",),
  "text_encoder_2": ("CLIPTextModelWithProjection",),
  "tokenizer": _CLIP_TOKENIZERS,
  "tokenizer_2": _CLIP_TOKENIZERS,
}

# What a UNet with `out_channels` 4 reads beside the latents, by the number of channels.
_READS = {
  1: "a depth map (a depth-to-image model)",
  3: "an image to enlarge (an upscaling model)",
  5: "a mask and what it leaves (an inpainting model)",
}


class Index(NamedTuple):
  """What model_index.json says.

  pipeline: its class and settings; the class is a name of `PIPELINES`.
  found: the class as it was found.
  scheduler: the class of the scheduler.
  two: whether there are two text encoders.
  """

  pipeline: dict[str, Any]
  found: str
  scheduler: str
  two: bool


def plain_name(name: Any) -> str:
  """A class's name without what says that it was of another framework or of one's own code."""
  name = name[-1] if isinstance(name, list | tuple) and name else name
  return name.removeprefix("Flax") if isinstance(name, str) else ""


def read_index(folder: pathlib.Path) -> Index:
  """Reads model_index.json.

  Raises ValueError unless the folder holds a Stable Diffusion 1.x, 2.x or XL of known components;
  its UNet may read an image too.
  """
  file = folder / INDEX
  index = files.read_json(file)
  entries = {
    name: plain_name(entry)
    for name, entry in index.items()
    if isinstance(entry, list) and any(entry) and not name.startswith("_")
  }
  found = plain_name(index.get("_class_name")) or "no class"
  known = found in PIPELINES
  two = not entries.keys().isdisjoint(SECOND) or (known and "XL" in found)
  needed = (*ALWAYS, *(SECOND if two else ()))
  missing = sorted(set(needed) - entries.keys())
  foreign = sorted(entries.keys() - {*needed, *_WITHOUT_PART})
  if not known and "unet" not in entries:
    raise ValueError(
      f"{file}: expected a pipeline that is supported, found {checks.cut(found, 60)}\n"
      "supported, from text: Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1, FLUX.2, Z-Image and "
      "Qwen-Image; their versions that edit, fill or control are not"
    )
  if missing or foreign:
    raise ValueError(
      f"{file}: expected a Stable Diffusion 1.x, 2.x or XL pipeline, found {checks.cut(found, 60)}"
      + (f" without {checks.first(missing)}" if missing else f" with {checks.first(foreign)}")
    )
  for name in needed:
    _check(file, name, entries[name])
  settings = {
    name: value
    for name, value in index.items()
    if not isinstance(value, list) and not name.startswith("_")
  }
  if "requires_safety_checker" in settings:
    settings["requires_safety_checker"] = False  # it is not kept
  # A class that is not known, or not of so many text encoders, says how others sample the model.
  settings["_class_name"] = found if known and two == ("XL" in found) else _STANDARD[two]
  return Index(settings, found, entries["scheduler"], two)


def text_half(config: dict[str, Any]) -> dict[str, Any]:
  """The text encoder's own config, where a file has that of images too; others as they are."""
  half = config.get("text_config")
  both = config.get("model_type") in ("clip", "mistral3", "qwen2_5_vl")
  return half if both and isinstance(half, dict) else config


def check_config(file: pathlib.Path, component: str, config: Mapping[str, Any]) -> None:
  """Raises ValueError if a component's config names another class than the network we know."""
  if "_class_name" in config:
    _check(file, component, plain_name(config["_class_name"]))
  architectures = config.get("architectures")
  # Of CLIP's own names a file has now this one, now that one.
  if isinstance(architectures, list) and architectures and "CLIP" not in str(architectures[0]):
    _check(file, component, str(architectures[0]))


def _check(file: pathlib.Path, component: str, found: str) -> None:
  expected = COMPONENTS.get(component)
  if expected is not None and found not in expected:
    raise other_network(file, component, expected[0], found)


def other_network(file: pathlib.Path, component: str, expected: str, found: str) -> ValueError:
  """The error for a component of another class than the network we know."""
  return ValueError(
    f"{file}: expected {component} of class {expected}, found {checks.cut(found, 60)!r}\n"
    "this component is another network, which is not supported"
  )


def check_channels(where: Any, read: int, written: int) -> None:
  """Raises ValueError, by the word for it, for a UNet that reads more than text-to-image does.

  As many channels as it writes may follow: the latents of an image to edit.
  """
  extra = read - written
  if extra > 0 and extra != written:
    what = _READS.get(extra, "something else") if written == 4 else "something else"
    raise ValueError(
      f"{where}: expected a UNet that reads {written} channels, as text-to-image models do, found "
      f"{read}: beside the latents it reads {what}\ntake a model that reads text alone"
    )
