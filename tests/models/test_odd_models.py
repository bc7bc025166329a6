"""Folders that say something odd of themselves: taken and named, or refused in a few words."""

import json
import shutil
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import small_models
from ml_collections import config_dict

from jaxalign import files
from jaxalign.diffusion import schedulers
from jaxalign.models import families
from jaxalign.models.families import stable_diffusion, stable_diffusion_networks
from jaxalign.models.identity import folders, identity
from jaxalign.models.weights import tensor_files
from jaxalign.training import workdir

EMA = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 500, "update_after_step": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The folder of a random model of the 1.x kind."""
  folder = tmp_path_factory.mktemp("sd1") / "model"
  stable_diffusion.save(small_models.make("sd1", tmp_path_factory.mktemp("tokenizers")), folder)
  return folder


@pytest.fixture(scope="module")
def plain(saved):
  """The model of that folder."""
  return stable_diffusion.open_model(saved)


@pytest.fixture
def model(saved, tmp_path):
  """A copy of it, to be changed."""
  return shutil.copytree(saved, tmp_path / "model")


def change(file, **fields):
  files.write_json(file, {**files.read_json(file), **fields})


INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"
TEXT, SCHEDULER = "text_encoder/config.json", folders.SCHEDULER


@pytest.mark.parametrize(
  ("file", "fields", "words"),
  [
    (UNET, {"in_channels": 9}, "found 9: .*a mask and what it leaves .an inpainting model"),
    (UNET, {"in_channels": 5}, "found 5: .*depth"),
    (UNET, {"in_channels": 7}, "found 7: .*upscaling"),
    (UNET, {"in_channels": 6}, "found 6: .*something else"),
    (UNET, {"_class_name": "UNet2DModel"}, "expected unet of class .*found 'UNet2DModel'"),
    (UNET, {"norm_num_group": 4}, 'unknown field .*did you mean "norm_num_groups"'),
    (UNET, {"down_block_types": ["DownBlock3D"] * 300}, "is not supported; supported: 'DownBlo"),
    (UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}, "found quantization_config"),
    # GLIGEN as it was first published (IDEA-Research/GroundingDINO#296).
    (UNET, {"use_gated_attention": True}, "use_gated_attention=True"),
    (VAE, {"_class_name": "AutoencoderTiny"}, "expected vae of class .*found 'AutoencoderTiny'"),
    (VAE, {"scaling_factors": 1.0}, 'unknown field .*did you mean "scaling_factor"'),
    (TEXT, {"architectures": ["RobertaSeriesModelWithTransformation"]}, "found 'RobertaSeries"),
    (TEXT, {"quantization_config": {"bits": 4}}, "found quantization_config"),
    (SCHEDULER, {"trained_betas": [0.001] * 1000}, r"trained_betas: expected None; got \[0.001"),
    (UNET, {"in_channels": [4, 4]}, r"in_channels to be a whole number, found \[4, 4\]"),
    (UNET, {"layers_per_block": [1] * 900}, "one entry of layers_per_block for each"),
    (VAE, {"block_out_channels": None}, "to be a list, each a whole number, found None"),
    (TEXT, {"num_hidden_layers": 100_000}, "num_hidden_layers: expected at least 1 and below 512"),
    (TEXT, {"hidden_size": 0}, "hidden_size: expected at least 1"),
    (UNET, {"transformer_layers_per_block": 5000}, "transformer_layers_per_block=5000 is not sup"),
    (VAE, {"layers_per_block": -1}, "layers_per_block: expected at least 1"),
    (VAE, {"block_out_channels": [4, None]}, "each a whole number, found .4, None"),
    (UNET, {"sample_size": []}, "sample_size: expected a size, or height and width, got .."),
    (UNET, {"sample_size": [8, 0]}, "sample_size: expected a size"),
    (SCHEDULER, {"clip_sample": "false"}, "clip_sample to be true or false, found 'false'"),
    (VAE, {"scaling_factor": "0.18215"}, "scaling_factor to be a number, found '0.18215'"),
    (UNET, {"norm_eps": "x" * 999}, "norm_eps to be a number, found 'xxx"),
    (SCHEDULER, {"thresholding": True}, "thresholding: expected False; got True"),
    (INDEX, {"scheduler": ["diffusers", "LCMScheduler"]}, "got 'LCMScheduler'"),
    (INDEX, {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "got 'EDMEulerScheduler'"),
    (INDEX, {"unet": ["diffusers", "OnnxRuntimeModel"]}, "found 'OnnxRuntimeModel'"),
    (INDEX, {"tokenizer": ["transformers", "BertTokenizer"]}, "found 'BertTokenizer'"),
    (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "with controlnet"),
    (INDEX, {f"part_{i}": ["a", "B"] for i in range(500)}, "with part_0, .* and 495 more"),
    (INDEX, {"_class_name": "StableDiffusionXLPipeline"}, "without text_encoder_2, tokenizer_2"),
    (INDEX, {"_class_name": "X" * 5000, "unet": None}, "found XXX"),
  ],
)
def test_what_is_not_known_is_refused_by_name(model, file, fields, words):
  change(model / file, **fields)
  with pytest.raises(ValueError, match=f"(?s){words}") as error:
    families.open_model(model)
  message = str(error.value)
  assert message.startswith(str(model))
  assert len(message) - len(str(model)) < 600
  assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
  ("file", "fields", "note"),
  [
    (VAE, {"scaling_factor": None}, "vae: scaling_factor null -> 0.18215"),
    (VAE, {"sample_size": None, "force_upcast": None}, "vae: sample_size null -> 32; force_upcast"),
    (UNET, {"norm_eps": None, "freq_shift": None}, "unet: norm_eps null -> 1e-05; freq_shift nul"),
    (UNET, {"sample_size": None}, "unet: no sample_size; the size of images is that of vae/c"),
    (UNET, {"later_option": [1] * 1000}, "unet: unknown later_option=[1, 1, 1, 1"),
    (UNET, {"a_name" * 200: 1}, "unet: unknown a_namea_name"),
    (VAE, {"later_option": "other"}, "vae: unknown later_option='other': taken to change nothing"),
    (UNET, EMA, "unet: left out decay, inv_gamma, optimization_step, update_after_step"),
    (TEXT, {"layer_norm_eps": None}, "text_encoder: layer_norm_eps null -> 1e-05"),
    (SCHEDULER, {"beta_end": None}, "scheduler: beta_end null -> 0.02"),
    (INDEX, {"_class_name": ["mine", "MyPipeline"]}, "pipeline: MyPipeline taken for StableDiff"),
    (INDEX, {"_class_name": "FlaxMyPipeline"}, "pipeline: MyPipeline taken for StableDiffusionP"),
  ],
)
def test_what_is_read_all_the_same_is_named(model, file, fields, note):
  change(model / file, **fields)
  found = folders.read(model)
  assert [line[: len(note)] for line in identity.in_lines(found.notes)] == [note]
  networks = stable_diffusion_networks.make(found.configs)
  assert networks.vae.config.scaling_factor == 0.18215
  assert networks.image_size == (16, 16)


def test_a_text_encoder_of_a_whole_clip_is_its_text_half(model, plain):
  """A config.json of both towers, of which transformers reads the text's too."""
  text = files.read_json(model / TEXT)
  both = {"model_type": "clip", "text_config": text, "vision_config": {}, "projection_dim": 7}
  files.write_json(model / TEXT, both)
  found = folders.read(model)
  assert found.configs == plain.configs
  assert identity.in_lines(found.notes) == ["text_encoder: its text_config is read, of both towers"]


def test_an_averaged_unet_is_the_same_model(model, plain):
  """What a script of training keeps beside an average (huggingface/diffusers PR#2048)."""
  change(model / UNET, **EMA)
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    opened = stable_diffusion.open_model(model)
  assert len(told) == 1 and "unet: left out decay, inv_gamma" in str(told[0].message)
  assert opened.networks == plain.networks
  assert opened.configs["unet"] == plain.configs["unet"]
  jax.tree.map(np.testing.assert_array_equal, opened.params, plain.params)


def add_tensors(file, *names):
  tensors = safetensors.numpy.load_file(file)
  extra = {name: np.ones((2, 3), np.float32) for name in names}
  safetensors.numpy.save_file({**tensors, **extra}, file)


@pytest.mark.parametrize(
  "names",
  [
    # openai/clip-vit-large-patch14 has both towers in its file (CompVis/stable-diffusion#10).
    ("vision_model.post_layernorm.weight", "visual_projection.weight", "logit_scale"),
    # That of XL's first folder.
    ("text_projection.weight",),
    ("classifier.weight", "score.dense.weight"),
  ],
)
def test_other_networks_beside_a_text_encoder_are_left_out(model, plain, names):
  add_tensors(model / "text_encoder/model.safetensors", *names)
  with pytest.warns(UserWarning, match=f"{len(names)} tensors of other networks are left out"):
    opened = stable_diffusion.open_model(model)
  jax.tree.map(np.testing.assert_array_equal, opened.params, plain.params)


@pytest.mark.parametrize(
  ("file", "name"),
  [
    ("text_encoder/model.safetensors", "text_model.encoder.layers.9.layer_norm1.weight"),
    # As transformers 5 writes them.
    ("text_encoder/model.safetensors", "encoder.layers.9.layer_norm1.weight"),
    ("unet/diffusion_pytorch_model.safetensors", "class_embedding.weight"),
    ("vae/diffusion_pytorch_model.safetensors", "quantize.embedding.weight"),
  ],
)
def test_parts_of_a_network_that_its_config_does_not_have_are_refused(model, file, name):
  add_tensors(model / file, name)
  with pytest.raises(ValueError, match=f"1 unexpected: {name}"):
    stable_diffusion.open_model(model)


def test_a_bundle_of_notes_is_a_few_lines():
  notes = [identity.Note(f"part_{i % 50}", "a long word " * 20) for i in range(500)]
  with pytest.warns(UserWarning, match="assumed or corrected") as told:
    identity.tell("folder/" * 100, notes)
  assert len(str(told[0].message)) <= 600
  assert 1 < len(str(told[0].message).splitlines()) <= 5


def test_what_is_exported_is_what_was_corrected(model, tmp_path, command):
  """A notice on the command line, and none of the folder that it wrote."""
  change(model / SCHEDULER, clip_sample=True, steps_offset=0)
  change(model / INDEX, _class_name="MyPipeline")
  process = command("export", f"--model={model}", f"--output={tmp_path / 'out'}", cwd=tmp_path)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  assert f"warning: {model}, assumed or corrected (docs/troubleshooting.md):\n" in errors
  assert "\n  scheduler: clip_sample true -> false; steps_offset 0 -> 1\n" in errors
  assert "UserWarning" not in errors
  written = files.read_json(tmp_path / "out" / SCHEDULER)
  assert (written["clip_sample"], written["steps_offset"]) == (False, 1)
  assert files.read_json(tmp_path / "out" / INDEX)["_class_name"] == "StableDiffusionPipeline"
  assert folders.read(tmp_path / "out").notes == ()


def test_a_run_keeps_what_was_corrected(tmp_path):
  config, lines = config_dict.ConfigDict({"seed": 0}), ["scheduler: clip_sample true -> false"]
  # A later start is one of a folder that was mended.
  for name, corrections in (("run", lines), ("run", ()), ("other", ())):
    with workdir.prepared(tmp_path / name, config, corrections):
      pass
  assert files.read_json(tmp_path / "run" / "config.json")["model_corrections"] == lines
  assert "model_corrections" not in files.read_json(tmp_path / "other" / "config.json")


def rename(model, name):
  (model / "unet" / tensor_files.WEIGHTS).rename(model / "unet" / name)


def test_the_only_variant_is_taken_and_named(model, plain):
  """A run published as *.non_ema alone (huggingface/diffusers PR#991)."""
  rename(model, "diffusion_pytorch_model.non_ema.safetensors")
  with pytest.warns(UserWarning, match="unet: weights of the variant non_ema, the only ones"):
    opened = stable_diffusion.open_model(model)
  jax.tree.map(np.testing.assert_array_equal, opened.params["unet"], plain.params["unet"])
  other = model / "unet" / "diffusion_pytorch_model.ema.safetensors"
  other.write_bytes(b"")
  with pytest.raises(ValueError, match="one variant of it, found ema, non_ema\nkeep one"):
    tensor_files.find_weights(model / "unet")
  other.rename(other.with_name("diffusion_pytorch_model.fp16.safetensors"))
  assert tensor_files.find_weights(model / "unet").name.endswith("fp16.safetensors")
  assert tensor_files.find_other_variant(model / "unet") == ""


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"])
def test_a_solver_without_an_offset_is_sampled_on_the_same_grid(model, name):
  config = {k: v for k, v in small_models.SCHEDULER.items() if k != "steps_offset"}
  files.write_json(model / SCHEDULER, {**config, "_class_name": name})
  change(model / INDEX, scheduler=["diffusers", name])
  with pytest.warns(UserWarning):
    found = schedulers.from_config(folders.read(model).configs["scheduler"], 5)
  expected = schedulers.from_config(small_models.SCHEDULER, 5)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# Of each type all values that it has, by its definition (arXiv:2209.05433, table 1).
FLOAT8 = {"float8_e4m3fn": (448.0, 2.0**-9), "float8_e5m2": (57344.0, 2.0**-16)}


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_read_exactly(model, name):
  """As files for small GPUs are stored (huggingface/diffusers#8537)."""
  torch = pytest.importorskip("torch")
  from safetensors.torch import save_file

  file = model / "unet" / tensor_files.WEIGHTS
  stored = safetensors.numpy.load_file(file)
  tensors = {k: torch.from_numpy(x).to(getattr(torch, name)) for k, x in stored.items()}
  save_file(tensors, file, metadata={"format": "pt"})
  opened = tensor_files.open_file(file)
  for tensor, array in opened.tensors.items():
    np.testing.assert_array_equal(np.asarray(array), tensors[tensor].float().numpy())
  weight = opened.tensors["conv_in.weight"]
  part = (slice(1, 5), slice(2, 3), slice(0, 2), slice(1, 3))
  np.testing.assert_array_equal(weight[part], tensors["conv_in.weight"].float().numpy()[part])
  assert folders.read(model).notes == ()

  every = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name))
  every = every[np.isfinite(every.astype(np.float32))]  # others are refused, as of any weight
  extremes = {"all": torch.from_numpy(every.view(np.uint8)).view(getattr(torch, name))}
  one, none = extremes["all"][7].clone(), extremes["all"][:0].clone()
  save_file({**extremes, "one": one, "none": none}, file)
  opened = tensor_files.open_file(file).tensors
  values = np.asarray(opened["all"])
  np.testing.assert_array_equal(values, extremes["all"].float().numpy())
  assert (values.max(), values[values > 0].min()) == FLOAT8[name]
  assert (np.asarray(opened["one"]), opened["none"].shape) == (values[7], (0,))


@pytest.mark.parametrize("scale", ["conv_in.scale_weight", "conv_in.weight_scale", "scaled_fp8"])
def test_scaled_float8_is_refused_by_name(model, scale):
  """Wrong by a factor without their scales (leejet/stable-diffusion.cpp PR#1898)."""
  file = model / "unet" / tensor_files.WEIGHTS
  tensors = {**safetensors.numpy.load_file(file), scale: np.ones(1, np.float32)}
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match=f"found {scale}, a scale or mark of quantised") as error:
    families.open_model(model)
  assert len(str(error.value).splitlines()) == 2


def test_a_type_that_numpy_does_not_know_is_refused_by_name(tmp_path):
  file = tmp_path / "model.safetensors"
  header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
  file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
  with pytest.raises(ValueError, match="found x in F8_E8M0\ntake another variant"):
    tensor_files.open_file(file)
