"""From the name of a model to the folder that holds it."""

import os
import pathlib

_EMBEDDED = {
  "shapes": pathlib.Path(__file__).resolve().parents[2] / "worlds" / "assets" / "shapes",
}
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Repositories also hold pickles, other frameworks' weights and single-file copies of everything.
_SMALL_FILES = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]
_WEIGHTS = [f"{c}/*model{{}}.safetensors" for c in _COMPONENTS]


def find_folder(path_or_name: str | os.PathLike) -> pathlib.Path:
  """The folder of an embedded model ("shapes"), of an existing path, or of a hub id, downloaded."""
  name = os.fspath(path_or_name)
  if name in _EMBEDDED:
    return _EMBEDDED[name]
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return path
  if path.is_file():
    raise ValueError(
      f"{path} is a single file; expected a folder in the diffusers layout. Convert it once with "
      f"diffusers: StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)"
    )
  if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
    raise ValueError(
      f"no model folder at {path}; expected a folder, a hub id such as owner/name, or one of "
      f"{sorted(_EMBEDDED)}"
    )
  return _download(name)


def _download(repo_id: str) -> pathlib.Path:
  import huggingface_hub

  try:
    folder = _snapshot(huggingface_hub, repo_id, variant="")
    found = [folder / name for name in _COMPONENTS if (folder / name).is_dir()]
    if not all(any(component.glob("*.safetensors")) for component in found):
      folder = _snapshot(huggingface_hub, repo_id, variant=".fp16")
  except Exception as error:  # the client's failures share no base class: network, id, access
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    raise ValueError(
      f"no folder {repo_id!r} here, and the hub did not give a model of that name:\n"
      f"{type(error).__name__}: {reason}\n"
      f"Check the spelling, the network, and for gated models that you are logged in."
    ) from None
  return folder


def _snapshot(huggingface_hub, repo_id: str, variant: str) -> pathlib.Path:
  patterns = _SMALL_FILES + [pattern.format(variant) for pattern in _WEIGHTS]
  return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
