"""Weights that wrappers renamed are read, and numbers that no program may see go no further.

The situations are of public reports, each named; the models are our own.
"""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_models

from jaxalign import checks, sample
from jaxalign.distributed import sharding
from jaxalign.modalities.image import IMAGES
from jaxalign.models import tokenization
from jaxalign.models.families import clip_dual, stable_diffusion
from jaxalign.models.weights import hub, lazy, safetensors_io, tensor_files

FILE = safetensors_io.WEIGHTS


def make_tree(seed=0):
  rng = np.random.default_rng(seed)
  kernel = rng.standard_normal((3, 3, 2, 4), np.float32)
  return {
    "conv_in": {"kernel": kernel, "bias": rng.standard_normal(4, np.float32)},
    "mid_block": {"attentions_0": {"to_q": {"kernel": rng.standard_normal((4, 4), np.float32)}}},
  }


def rewritten(folder, change):
  """Writes the tree to `folder`, its tensors' names and arrays changed by `change(name, array)`."""
  safetensors_io.write_component(folder, make_tree(), {})
  tensors = safetensors.numpy.load_file(folder / FILE)
  changed = dict(change(name, array.copy()) for name, array in tensors.items())
  safetensors.numpy.save_file(changed, folder / FILE, metadata={"format": "pt"})
  return folder


# ---- names that wrappers changed

WRAPPERS = [
  "_orig_mod.",  # karpathy/nanoGPT#325, huggingface/diffusers#9279: torch.compile
  "module.",  # huggingface/diffusers#5617, mlfoundations/open_clip PR#639: DistributedDataParallel
  "module._orig_mod.",  # FareedKhan-dev/train-llm-from-scratch PR#37: both
  "_orig_mod.module.",
  "_fsdp_wrapped_module.",  # huggingface/peft strips it as it saves
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_before_every_name_changes_nothing(tmp_path, wrapper):
  folder = rewritten(tmp_path, lambda name, array: (wrapper + name, array))
  found = safetensors_io.read_component(folder, make_tree())
  jax.tree.map(np.testing.assert_array_equal, found, make_tree())


def test_a_wrapper_of_each_block_changes_nothing(tmp_path):
  """pytorch/pytorch's compilation by region, and checkpointed activations, wrap blocks alone."""
  inner = "attentions.0._orig_mod._checkpoint_wrapped_module"
  folder = rewritten(tmp_path, lambda name, array: (name.replace("attentions.0", inner), array))
  found = safetensors_io.read_component(folder, make_tree())
  jax.tree.map(np.testing.assert_array_equal, found, make_tree())


def test_a_weight_with_and_without_its_wrapper_is_refused(tmp_path):
  folder = rewritten(tmp_path, lambda name, array: (name, array))
  tensors = safetensors.numpy.load_file(folder / FILE)
  tensors["module.conv_in.bias"] = tensors["conv_in.bias"] + 1.0
  safetensors.numpy.save_file(tensors, folder / FILE)
  with pytest.raises(ValueError, match=r"each weight once, found .*conv_in\.bias and .*conv_in"):
    safetensors_io.open_component(folder, make_tree())


def test_a_name_that_only_looks_wrapped_is_still_reported_as_it_stands(tmp_path):
  folder = rewritten(tmp_path, lambda name, array: (name.replace("conv_in", "module.x"), array))
  with pytest.raises(ValueError, match=r"2 missing: conv_in.*2 unexpected: module\.x\.bias"):
    safetensors_io.open_component(folder, make_tree())


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["conv_in.bias", "mid_block.attentions.0.to_q.weight"])
def test_weights_that_are_not_finite_do_not_enter(tmp_path, name, value):
  """huggingface/diffusers#6815, #4325; kohya-ss/sd-scripts#1091: what a training left."""

  def spoil(found, array):
    if found == name:
      array.flat[2] = value
    return found, array

  opened = safetensors_io.open_component(rewritten(tmp_path, spoil), make_tree())
  with pytest.raises(ValueError) as caught:
    sharding.place_params(opened, sharding.one_device())
  assert f"{tmp_path / FILE}: {name}: expected finite numbers, found 1 of" in str(caught.value)
  assert len(str(caught.value).splitlines()) == 2


def test_lazy_weights_are_looked_at_where_they_are_read_and_nowhere_else(tmp_path):
  def spoil(name, array):
    if name == "conv_in.weight":
      array[3] = np.nan
    return name, array

  opened = safetensors_io.open_component(rewritten(tmp_path, spoil), make_tree())
  kernel = opened["conv_in"]["kernel"]
  assert isinstance(kernel, lazy.LazyArray)
  assert np.isfinite(kernel[:, :, :, :3]).all()  # the part of another device
  with pytest.raises(ValueError, match=r"conv_in\.weight: .*found 18 of 18"):
    kernel[:, :, :, 3:]


def test_half_precision_that_overflowed_is_refused(tmp_path):
  """kohya-ss/sd-scripts#201, bmaltais/kohya_ss#1986: float16 has no number above 65504."""
  with np.errstate(over="ignore"):
    folder = rewritten(tmp_path, lambda name, array: (name, (array * 1e5).astype(np.float16)))
  with pytest.raises(ValueError, match="that are NaN or inf\nit comes of a training that diverged"):
    safetensors_io.read_component(folder, make_tree())


@pytest.mark.parametrize("large", [3e38, 2e19])
def test_large_numbers_are_finite(large):
  """Their squares are not, in float32."""
  checks.check_finite("weights", np.full((3, 4), large, np.float32), "")
  with pytest.raises(ValueError, match="weights: expected finite numbers, found 1 of 12"):
    spoiled = np.full((3, 4), large, np.float32)
    spoiled[1, 1] = -np.inf
    checks.check_finite("weights", spoiled, "remedy")


def test_what_is_empty_is_read_as_it_is(tmp_path):
  """Comfy-Org/ComfyUI PR#7840: files that hold tensors of no elements."""
  path = tmp_path / "a.safetensors"
  safetensors.numpy.save_file({"v_pred": np.zeros(0, np.float32)}, path)
  assert np.asarray(tensor_files.open_file(path).tensors["v_pred"]).shape == (0,)


def test_weights_that_are_not_finite_do_not_leave(tmp_path):
  tree = make_tree()
  safetensors_io.write_component(tmp_path, tree, {})
  before = (tmp_path / FILE).read_bytes()
  tree["conv_in"]["bias"][1] = np.nan
  with pytest.raises(ValueError, match=rf"{FILE}: conv_in\.bias: .*\nnothing is written"):
    safetensors_io.write_component(tmp_path, tree, {})
  assert (tmp_path / FILE).read_bytes() == before
  assert {file.name for file in tmp_path.iterdir()} == {FILE, "config.json"}


def test_samples_that_are_not_finite_are_not_written():
  """KohakuBlueleaf/LyCORIS#27: others say that NaNs were produced; black is no answer."""
  params = {"params": {"conv_in": {"bias": np.zeros(3, np.float32)}}, "vae": {"x": np.ones(2)}}
  images = np.zeros((2, 8, 8, 3), np.float32)
  sample.check(images, IMAGES, params)
  images[1, 0, 0, 0] = np.nan
  with pytest.raises(ValueError, match=r"1 of 2 with NaN.*\n.*all parameters are finite; try"):
    sample.check(images, IMAGES, params)
  params["vae"]["x"][0] = np.inf
  with pytest.raises(ValueError, match=r"nothing is written: .* in the parameter vae/x;") as caught:
    sample.check(images, IMAGES, params)
  assert len(str(caught.value).splitlines()) == 2


# ---- token ids


def with_token(folder, token="<my-cat>", **config):
  """The tokenizer's files with one more token, whose id is the next, as transformers writes it."""
  vocab = json.loads((folder / "vocab.json").read_text())
  number = len(vocab)
  (folder / "added_tokens.json").write_text(json.dumps({token: number}))
  path = folder / "tokenizer_config.json"
  flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
  entry = {"content": token, "special": False, **flags}
  found = json.loads(path.read_text()) | config
  found["added_tokens_decoder"] = {str(number): entry}
  path.write_text(json.dumps(found))
  return number


def test_a_token_beyond_the_embeddings_is_named(tmp_path):
  """kuprel/min-dalle#93; huggingface/transformers#1413, #12763: embeddings were not resized."""
  model = small_models.make("sd1", tmp_path)
  number = with_token(tmp_path / "tokenizer")
  tokenization._load.cache_clear()
  assert number == model.configs["text_encoder"]["vocab_size"]
  assert model.tokenize(["a cat"]).max() < number
  with pytest.raises(ValueError) as caught:
    model.tokenize(["a cat", "a <my-cat>"])
  message = str(caught.value)
  assert f"prompt 1, 'a <my-cat>': expected ids below {number}" in message
  assert f"found {number}, '<my-cat>'" in message and "--tokenizer" in message
  assert len(message.splitlines()) == 2


def test_a_padding_token_beyond_the_embeddings_is_named(tmp_path):
  """georgesung/llm_qlora#7, meta-llama/llama-cookbook#189: one was added for padding."""
  model = small_models.make("sd1", tmp_path)
  number = with_token(tmp_path / "tokenizer", "<pad>", pad_token="<pad>")
  special = tmp_path / "tokenizer" / "special_tokens_map.json"
  special.write_text(json.dumps(json.loads(special.read_text()) | {"pad_token": "<pad>"}))
  tokenization._load.cache_clear()
  with pytest.raises(ValueError, match=rf"found {number}, '<pad>' for padding"):
    stable_diffusion.as_model(model)  # the empty prompt is padding


def test_each_tokenizer_of_an_xl_is_held_against_its_own_text_encoder(tmp_path):
  """huggingface/diffusers PR#9304: pivotal tuning adds tokens to both, and may resize one."""
  model = small_models.make("xl", tmp_path)
  number = with_token(tmp_path / "tokenizer_2")
  tokenization._load.cache_clear()
  folder = str(tmp_path / "tokenizer_2")
  with pytest.raises(ValueError, match=f"found {number}, '<my-cat>'\n.*instead of {folder}"):
    model.tokenize(["a <my-cat>"])


def test_the_tokenizer_of_another_clip_is_refused_by_a_reward(tmp_path):
  """A PickScore with the tokenizer of another model: its score would be of other words."""
  small_models.write_tokenizer(tmp_path / "tokenizer")
  text = {**small_models.TEXT, "vocab_size": 50}
  vision = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
  }
  model = clip_dual.build(
    {"text_config": text, "vision_config": vision}, tokenizer_folder=tmp_path / "tokenizer"
  )
  with pytest.raises(ValueError, match="prompt 0, 'cat': expected ids below 50"):
    model.tokenize(["cat"])


def test_added_tokens_are_saved_with_the_tokenizer(tmp_path):
  small_models.write_tokenizer(tmp_path / "a")
  number = with_token(tmp_path / "a")
  tokenization.copy(tmp_path / "a", tmp_path / "b")
  for folder in ("a", "b"):
    found = tokenization.tokenize(
      tmp_path / folder, ["<my-cat>"], 8, num_embeddings=number + 1
    )
    assert number in found


# ---- as a user sees it


def test_commands_end_with_a_message(tmp_path, command):
  """Non-zero, two lines, and nothing on disk."""
  shutil.copytree(hub.find_model("shapes"), tmp_path / "model")
  file = tmp_path / "model" / "unet" / FILE
  tensors = {name: array.copy() for name, array in safetensors.numpy.load_file(file).items()}
  tensors["conv_in.bias"].flat[0] = np.nan
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  with_token(tmp_path / "model" / "tokenizer")
  model = f"--model={tmp_path / 'model'}"
  started = {
    "conv_in.bias: expected finite": command("export", model, "--output=out", cwd=tmp_path),
    "--guidance_scale=nan": command("sample", model, "--guidance_scale=nan", cwd=tmp_path),
  }
  for words, process in started.items():
    _, errors = process.communicate()
    assert process.returncode == 1 and words in errors, errors
    assert len(errors.splitlines()) <= 3 and "Traceback" not in errors
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
