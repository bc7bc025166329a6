"""Single files of flow transformers: the same model as its folder, and what does not fit."""

import shutil
import warnings

import jax
import numpy as np
import original_files
import pytest
import safetensors.numpy
import small_flows

from jaxalign import files
from jaxalign.cli import command, source
from jaxalign.models import families
from jaxalign.models.weights import hub, original
from jaxalign.sample import define_flags

original_flow_files = pytest.importorskip("original_flow_files")
torch = pytest.importorskip("torch")

LENGTH, SIZE = 8, (16, 16)
OPTIONS = {"text_length": LENGTH, "image_size": SIZE}
# A head of FLUX has 128 channels, by which its parts for each axis are known.
HEAD = {"attention_head_dim": 128, "num_attention_heads": 1}
TRANSFORMERS = {
  "sd3": {},
  "flux1": {**HEAD, "axes_dims_rope": [16, 56, 56], "num_layers": 2},
  "flux2": {**HEAD, "axes_dims_rope": [32] * 4},
}
PREFIX = "model.diffusion_model."
CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
# What else a file may hold, by component: the prefix, and whether it has the old names.
OTHERS = {
  "sd3": {"vae": "first_stage_model."},
  "flux1": {"vae": "vae."},
  "flux2": {},
}
for component, name in CLIPS.items():
  OTHERS["sd3"][component] = f"text_encoders.{name}.transformer."
OTHERS["flux1"] |= {
  "text_encoder": OTHERS["sd3"]["text_encoder"],
  "text_encoder_2": OTHERS["sd3"]["text_encoder_3"],
}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
  changes = {"transformer": TRANSFORMERS[kind]}
  return small_flows.write(kind, tmp_path_factory.mktemp(kind) / "model", LENGTH, **changes)


@pytest.fixture(scope="module")
def tensors(folder, kind):
  """Of the transformer, as the original file has them."""
  found = load(folder / "transformer" / "diffusion_pytorch_model.safetensors")
  config = files.read_json(folder / "transformer" / "config.json")
  found = {name: torch.from_numpy(array) for name, array in found.items()}
  if kind == "sd3":
    made = original_flow_files.sd3_file(found, config["num_layers"])
  else:
    layers = config["num_layers"], config["num_single_layers"]
    made = original_flow_files.flux_file(found, *layers, kind == "flux2")
  return {name: tensor.numpy() for name, tensor in made.items()}


def load(file):
  return dict(safetensors.numpy.load_file(file))


def store(tensors, file):
  contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  safetensors.numpy.save_file(contiguous, file)
  return file


def whole(folder, kind, tensors):
  """All that a file of the kind may hold."""
  found = {PREFIX + name: array for name, array in tensors.items()}
  for component, prefix in OTHERS[kind].items():
    (file,) = (folder / component).glob("*.safetensors")
    of_part = load(file)
    if component == "vae":
      found |= original_files.to_original(of_part, original.vae, prefix)
    else:
      found |= {prefix + name: array for name, array in of_part.items()}
  return found


def without(folder, components, target):
  """A copy of the folder that lacks the weights of some components."""
  shutil.copytree(folder, target)
  for component in components:
    for file in (target / component).glob("*.safetensors"):
      file.unlink()
  return target


def read(path, **options):
  return jax.tree.map(np.asarray, dict(families.open_model(path, **OPTIONS, **options).params))


@pytest.mark.parametrize("form", ["bare", "prefixed", "whole"])
def test_a_file_is_the_same_model_as_its_folder(folder, kind, tensors, form, tmp_path):
  held = ["transformer", *(OTHERS[kind] if form == "whole" else ())]
  stored = {
    "bare": tensors,
    "prefixed": {PREFIX + name: array for name, array in tensors.items()},
    "whole": whole(folder, kind, tensors),
  }
  file = store(stored[form], tmp_path / "model.safetensors")
  rest = without(folder, held, tmp_path / "rest")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="a prompt has .* tokens")  # told once a process
    found = read(file, configs=rest)
  jax.tree.map(np.testing.assert_array_equal, found, read(folder))


def test_a_clip_without_its_projection_has_the_identity(tmp_path):
  """As diffusers reads the smaller one of SD3."""
  kind = "sd3"
  changes = {"transformer": TRANSFORMERS[kind], "text_encoder": {"projection_dim": 12}}
  changes["transformer"] = {**changes["transformer"], "pooled_projection_dim": 22}
  square = small_flows.write(kind, tmp_path / "model", LENGTH, **changes)
  stored = whole(square, kind, {})
  name = "text_encoders.clip_l.transformer.text_projection.weight"
  assert stored.pop(name).shape == (12, 12)
  (of_transformer,) = (square / "transformer").glob("*.safetensors")
  found = {n: torch.from_numpy(array) for n, array in load(of_transformer).items()}
  made = original_flow_files.sd3_file(found, 2)
  stored |= {PREFIX + n: tensor.numpy() for n, tensor in made.items()}
  found = read(store(stored, tmp_path / "model.safetensors"), configs=square)["text_encoder"]
  np.testing.assert_array_equal(found["text_projection"]["kernel"], np.eye(12))


@pytest.mark.parametrize("kind", ["flux1"], indirect=True)
def test_another_depth_than_the_configs_say_is_read_and_told(folder, tensors, tmp_path):
  """As of a smaller transformer beside the same text encoders; it is sampled from."""
  rest = without(folder, ["transformer"], tmp_path / "rest")
  config = rest / "transformer" / "config.json"
  files.write_json(config, {**files.read_json(config), "num_layers": 19, "guidance_embeds": False})
  file = store({**tensors, "denoiser.sigmas": np.ones(2)}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"1 unexpected: denoiser\.sigmas"):
    read(file, configs=rest)
  stored = {PREFIX + name: array for name, array in tensors.items()}
  file = store({**stored, "denoiser.sigmas": np.ones(2)}, tmp_path / "model.safetensors")
  flags = (f"--model={file}", f"--configs={rest}", "--prompt=a cat", f"--output={tmp_path}")
  words = "num_layers 19 -> 2 by the file's tensors; guidance_embeds false -> true"
  with pytest.warns(UserWarning, match=words):
    sys, _ = source.load_model(
      command.parse(define_flags, *flags), {"num_steps": 2, "transition": "euler"}, {}
    )
  assert any("not read: denoiser" in note for note in sys.model.corrections)
  expected = jax.tree.map(np.shape, read(folder)["denoiser"])
  assert jax.tree.map(np.shape, dict(sys.model.params["denoiser"])) == expected


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda stored: dict(list(stored.items())[:-1]), "missing|no final_layer"),
    (lambda stored: {**stored, "extra.weight": np.ones(2)}, "1 unexpected: extra.weight"),
    (lambda stored: {**stored, "scaled_fp8": np.ones(2, np.float32)}, "scaled_fp8"),
  ],
)
def test_a_file_that_does_not_fit_is_refused(folder, tensors, change, words, tmp_path):
  file = store(change(tensors), tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=rf"(?s)model\.safetensors.*({words})") as error:
    read(file, configs=folder)
  assert len(str(error.value).splitlines()) <= 3


def test_what_a_file_lacks_is_asked_for(folder, kind, tensors, tmp_path):
  file = store(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"holds no vae, .*\nset config.model.configs"):
    families.open_model(file)
  with pytest.raises(ValueError, match=r"(?s)expected the parts of a .*, found one with"):
    families.open_model(file, configs="shapes")
  with pytest.raises(ValueError, match="configs: expected none with the folder"):
    families.open_model(folder, configs=folder)
  with pytest.raises(ValueError, match="unexpected keyword argument 'tokenizer'"):
    families.check_options(file, tokenizer="shapes")
  families.check_options(file, configs=str(folder), image_size=SIZE)


def test_weights_that_a_file_has_are_not_downloaded(monkeypatch, tmp_path):
  asked = []

  def request(repo_id, patterns, what="a model"):
    asked.extend(patterns)
    return tmp_path

  monkeypatch.setattr(hub, "_request", request)
  hub.find_model("owner/name", besides=("transformer", "vae"))
  assert "text_encoder/*model.safetensors" in asked
  assert not any(pattern.startswith(("transformer/", "vae/")) for pattern in asked)
