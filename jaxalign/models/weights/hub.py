"""From the name of a model to where it is: a folder, a file, or a repository on the hub.

Which token is sent and whether the network may be used is left to huggingface_hub, which reads them
from HF_TOKEN, HF_HUB_OFFLINE and its own files.
"""

import os
import pathlib
from collections.abc import Collection

from jaxalign.models.weights import tensor_files

_ASSETS = pathlib.Path(__file__).resolve().parents[2] / "worlds" / "assets"
EMBEDDED = {name: _ASSETS / name for name in ("shapes", "planner")}
_COMPONENTS = (
  *("unet", "transformer", "denoiser", "vae"),
  *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
# Repositories also hold pickles, other frameworks' weights and single-file copies of everything.
_SMALL_FILES = ["model_index.json", "*/config.json", "scheduler/*.json"]
_ADAPTERS = [tensor_files.LORA_WEIGHTS, tensor_files.PEFT_WEIGHTS, tensor_files.PEFT_CONFIG]
_TOKENIZER_FILES = [
  *("vocab.json", "merges.txt", "spiece.model", "*token*.json", "chat_template*"),
  *("processor_config.json", "preprocessor_config.json"),
]
_TOKENIZERS = [f"{folder}*" for folder in ("tokenizer/", "tokenizer_2/", "tokenizer_3/")]
_WEIGHTS = ("{}/*model{}.safetensors", "{}/*model{}-*-of-*.safetensors", "{}/*.index{}.json")
_VARIANTS = ("", ".fp16", ".bf16")


def find_model(
  path_or_name: str | os.PathLike, *, weights: bool = True, besides: Collection[str] = ()
) -> pathlib.Path:
  """Where a model is: a folder in the diffusers layout, or a single file of safetensors.

  Args:
    path_or_name: an embedded model ("shapes"), an existing path, or a hub id, which is downloaded.
    weights: whether they are downloaded too.
    besides: components whose weights are not.
  """
  found = _find_here(path_or_name)
  if found is None:
    if not weights:
      return find_folder(path_or_name)
    return _download(os.fspath(path_or_name), [n for n in _COMPONENTS if n not in besides])
  if found.is_file() and found.suffix in tensor_files.PICKLES:
    raise tensor_files.pickle_error(os.fspath(found))
  if found.is_file() and found.suffix != ".safetensors":
    raise ValueError(f"{found}: expected a .safetensors file, or a folder in the diffusers layout")
  return found


def find_adapter(path_or_name: str | os.PathLike) -> pathlib.Path:
  """Where adapters are: an existing file or folder, or those of the hub, which are downloaded.

  Args:
    path_or_name: a path, "owner/name", which must hold one adapter file, or "owner/name/FILE".
  """
  name = os.fspath(path_or_name)
  path = pathlib.Path(name).expanduser()
  owner, _, rest = name.partition("/")
  repository, _, file = rest.partition("/")
  if path.exists():
    return path
  is_path = path.is_absolute() or name.startswith((".", "~")) or not (owner and repository)
  if is_path or pathlib.Path(repository).suffix in (".safetensors", *tensor_files.PICKLES):
    raise ValueError(
      f"expected the weights {path}, found no such file\ncheck the path; a hub id is owner/name, "
      "or owner/name/FILE"
    )
  repo_id = f"{owner}/{repository}"
  if file:
    folder = _request(repo_id, [file, tensor_files.PEFT_CONFIG], "an adapter")
    if not (folder / file).is_file():
      raise ValueError(f"expected the file {file} in {repo_id} of the hub, found none; check it")
    return folder / file
  folder = _request(repo_id, _ADAPTERS, "an adapter")
  return folder if any(folder.glob("*.safetensors")) else folder / _only_file(repo_id)


def _only_file(repo_id: str) -> str:
  """The name of the one safetensors file at the top of a repository, once it is downloaded."""
  import huggingface_hub

  try:
    names = huggingface_hub.list_repo_files(repo_id)
  except Exception as error:  # see `_request`
    raise _failed(repo_id, "an adapter", error) from None
  found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
  if len(found) != 1:
    listed = ", ".join(found[:5]) or "none"
    raise ValueError(
      f"--lora={repo_id}: expected {' or '.join(_ADAPTERS[:2])}, or one other .safetensors file, "
      f"found {listed}\nname the one that you want: --lora={repo_id}/FILE"
    )
  _request(repo_id, found, "an adapter")
  return found[0]


def find_folder(path_or_name: str | os.PathLike) -> pathlib.Path:
  """The folder of a model for its configurations; of a hub id only these are downloaded."""
  found = _find_here(path_or_name)
  if found is None:
    return _request(os.fspath(path_or_name), [*_SMALL_FILES, *_TOKENIZERS])
  if found.is_file():
    raise ValueError(f"{found}: expected the folder of a model, or a hub id, found a file")
  return found


def find_tokenizer(path_or_name: str | os.PathLike) -> pathlib.Path:
  """The folder of a tokenizer: the one that is named, or `tokenizer/` in that of a model."""
  found = _find_here(path_or_name)
  if found is None:
    found = _request(os.fspath(path_or_name), [*_TOKENIZER_FILES, *_TOKENIZERS])
  return found / "tokenizer" if (found / "tokenizer").is_dir() else found


def _find_here(path_or_name: str | os.PathLike) -> pathlib.Path | None:
  """The embedded model or existing path that is named; None for what could be a hub id."""
  name = os.fspath(path_or_name)
  if name in EMBEDDED:
    return EMBEDDED[name]
  path = pathlib.Path(name).expanduser()
  if path.exists():
    return path
  if path.suffix in (".safetensors", *tensor_files.PICKLES):
    raise ValueError(f"no file {path}; check the path")
  if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
    raise ValueError(
      f"no model folder at {path}; expected a folder, a hub id such as owner/name, or one of "
      f"{sorted(EMBEDDED)}"
    )
  return None


def _download(repo_id: str, components: Collection[str]) -> pathlib.Path:
  """The snapshot of a model: configurations, tokenizers and one variant of the weights."""
  folder = _request(repo_id, [*_SMALL_FILES, *_TOKENIZERS, *_weights(components, "")])
  for variant in _VARIANTS[1:]:
    if not _without_weights(folder, components):
      break
    folder = _request(repo_id, _weights(components, variant))
  if _without_weights(folder, components):
    folder = _request(repo_id, _weights(components, ".*"))  # whatever other variant there is
  return folder


def _weights(components: Collection[str], variant: str) -> list[str]:
  return [pattern.format(name, variant) for name in components for pattern in _WEIGHTS]


def _without_weights(folder: pathlib.Path, components: Collection[str]) -> list[str]:
  """The components that have a configuration but no weights."""
  return [
    name
    for name in components
    if (folder / name / "config.json").is_file() and not any((folder / name).glob("*.safetensors"))
  ]


def _request(repo_id: str, patterns: list[str], what: str = "a model") -> pathlib.Path:
  """The local folder of a repository, with at least the files that match the patterns."""
  import huggingface_hub

  try:
    return pathlib.Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
  except Exception as error:  # the client's failures share no base class: network, id, access
    raise _failed(repo_id, what, error) from None


def _failed(repo_id: str, what: str, error: Exception) -> ValueError:
  reason = (str(error).strip() or repr(error)).splitlines()[0]
  return ValueError(
    f"no folder {repo_id!r} here, and the hub did not give {what} of that name:\n"
    f"{type(error).__name__}: {reason}\n"
    f"Check the spelling, the network, and for gated models that you are logged in."
  )
