"""Single files under their original names: whole models, and what does not fit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_models
from original_files import TEXT, UNETS, VAE, to_original

from jaxalign.models.families import stable_diffusion
from jaxalign.models.networks import clip, unet, vae
from jaxalign.models.weights import published, safetensors_io, single_file

# Of whole models, which are traced at every loading: one level, and each kind of layer.
SMALL_UNETS = {
  "1.x": {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
  },
  "2.x": UNETS["2.x"],
}
EXTRAS = {
  "model_ema.decay": np.float32([0.999]),
  "model_ema.diffusion_modelinput_blocks00weight": np.zeros((2, 2), np.float32),
  "betas": np.zeros(10, np.float32),
  "first_stage_model.loss.logvar": np.zeros(1, np.float32),
  "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(8)[None],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return small_models.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def make_model(tokenizer):
  """`make_model(kind)`: a small model of random weights."""

  def make(kind):
    built = stable_diffusion.build(
      unet=SMALL_UNETS[kind],
      vae=VAE,
      text_encoder={**TEXT, "hidden_act": "gelu"},
      scheduler=published.CONFIGS[kind]["scheduler"],
      tokenizer_folder=tokenizer,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda leaf: rng.standard_normal(leaf.shape, np.float32), built.networks.param_shapes()
    )
    return built.with_params(params)

  return make


def original_tensors(model, kind):
  """All tensors of a file of that kind, and what else such files hold."""
  tensors = dict(EXTRAS)
  for name, part in single_file.KINDS[kind].items():
    tensors |= to_original(
      safetensors_io.to_tensors(model.params[name]), part.names, part.prefix
    )
  if kind == "2.x":
    last = {n: x for n, x in tensors.items() if "transformer.resblocks.1." in n}
    tensors |= {n.replace("blocks.1.", "blocks.2."): x + 1 for n, x in last.items()}
    tensors["cond_stage_model.model.text_projection"] = np.zeros((12, 12), np.float32)
    tensors["cond_stage_model.model.logit_scale"] = np.zeros((), np.float32)
  return tensors


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def single(request, make_model, tmp_path_factory):
  """(kind, model, its folder, its single file)."""
  model = make_model(request.param)
  folder = tmp_path_factory.mktemp("single")
  stable_diffusion.save(model, folder / "model")
  file = folder / "model.safetensors"
  safetensors.numpy.save_file(original_tensors(model, request.param), file)
  return request.param, model, folder / "model", file


def test_a_single_file_is_the_folder_bit_for_bit(single, tokenizer):
  kind, model, folder, file = single
  assert single_file.open_checkpoint(file).kind == kind
  for kwargs in ({"configs": str(folder)}, {"configs": str(folder), "tokenizer": str(tokenizer)}):
    again = stable_diffusion.load(file, **kwargs)
    assert again.configs == model.configs
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  np.testing.assert_array_equal(again.tokenize(["a cat"]), model.tokenize(["a cat"]))


def test_a_half_precision_file_is_read_as_float32(single, tmp_path):
  kind, model, folder, _ = single
  halves = {n: x.astype(np.float16) for n, x in original_tensors(model, kind).items()}
  safetensors.numpy.save_file(halves, tmp_path / "half.safetensors")
  again = stable_diffusion.load(tmp_path / "half.safetensors", configs=str(folder))
  expected = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), model.params)
  jax.tree.map(np.testing.assert_array_equal, again.params, expected)


def test_a_saved_single_file_is_a_folder_that_loads(single, tmp_path):
  _, model, folder, file = single
  stable_diffusion.save(stable_diffusion.open_model(file, configs=str(folder)), tmp_path / "saved")
  again = stable_diffusion.load(tmp_path / "saved")
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_old_text_encoders_without_their_prefix(make_model, tmp_path):
  model = make_model("1.x")
  prefix = "cond_stage_model.transformer."
  tensors = {
    n.replace(f"{prefix}text_model.", prefix): x for n, x in original_tensors(model, "1.x").items()
  }
  safetensors.numpy.save_file(tensors, tmp_path / "old.safetensors")
  checkpoint = single_file.open_checkpoint(tmp_path / "old.safetensors")
  again = checkpoint.component("text_encoder", model.params["text_encoder"])
  jax.tree.map(np.testing.assert_array_equal, again, model.params["text_encoder"])


def test_an_xl_file_at_component_level(tmp_path):
  """UNet and both text encoders; the second has a projection, and more layers than are in use."""
  network = unet.UNet2DConditionModel(unet.UNetConfig.from_dict(UNETS["xl"]))
  added = {"text_embeds": jnp.zeros((1, 8)), "time_ids": jnp.zeros((1, 6))}
  inputs = (jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 8, 20)), added)
  text = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(TEXT))
  ids = jnp.zeros((1, 8), jnp.int32)
  of_text = jax.eval_shape(text.init, jax.random.key(0), ids)["params"]
  projection = {"kernel": jax.ShapeDtypeStruct((12, 6), np.float32)}
  shapes = {
    "unet": jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"],
    "vae": {"quant_conv": {"bias": np.zeros(8, np.float32)}},
    "text_encoder": of_text,
    "text_encoder_2": {**of_text, "text_projection": projection},
  }
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
  tensors = {}
  for name, part in single_file.KINDS["xl"].items():
    tensors |= to_original(safetensors_io.to_tensors(params[name]), part.names, part.prefix)
  tensors["conditioner.embedders.1.model.logit_scale"] = np.zeros((), np.float32)
  stored = tensors["conditioner.embedders.1.model.text_projection"]
  np.testing.assert_array_equal(stored, params["text_encoder_2"]["text_projection"]["kernel"])
  safetensors.numpy.save_file(tensors, tmp_path / "xl.safetensors")
  checkpoint = single_file.open_checkpoint(tmp_path / "xl.safetensors")
  assert checkpoint.kind == "xl"
  for name, tree in params.items():
    jax.tree.map(np.testing.assert_array_equal, checkpoint.component(name, shapes[name]), tree)


def test_an_xl_file_is_the_folder_bit_for_bit(small_xl, tmp_path):
  model, file = stable_diffusion.load(small_xl), tmp_path / "xl.safetensors"
  safetensors.numpy.save_file(original_tensors(model, "xl"), file)
  again = stable_diffusion.load(file, configs=str(small_xl))
  assert again.configs == model.configs
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  np.testing.assert_array_equal(again.tokenize(["a circle"]), model.tokenize(["a circle"]))
  with pytest.raises(ValueError, match="both of its tokenizers"):
    stable_diffusion.load(file)


def without(*words):
  return lambda tensors: {n: x for n, x in tensors.items() if not any(w in n for w in words)}


def replaced(name, array):
  return lambda tensors: {**tensors, name: np.zeros(array, np.float32)}


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (without("cond_stage"), "expected a whole .* found tensors of: betas, .*--lora"),
    (without("first_stage_model"), "expected a whole"),
    (lambda tensors: {"lora_unet_x.lora_down.weight": np.zeros(1)}, "tensors of: lora_unet_x"),
    (replaced(CONV_IN, (8, 9, 3, 3)), "found 9: .*an inpainting model"),
    (replaced(CONV_IN, (9, 4, 3, 3)), r"1 misshapen: conv_in.weight \(9, 4, 3, 3\) instead"),
    (without("middle_block.0.in_layers.0.bias"), "1 missing: mid_block.resnets.0.norm1.bias"),
    (without("in_proj_bias", "self_attn.q_proj.bias"), "missing: text_model.encoder"),
    (replaced("model.diffusion_model.control", (1,)), "1 unexpected: .*diffusion_model.control"),
    (replaced("first_stage_model.encoder.mid.attn_1.q.weight", (8, 8, 3, 3)), "misshapen: enc"),
  ],
)
def test_files_that_do_not_fit(single, tmp_path, change, words):
  kind, model, folder, _ = single
  tensors = change(original_tensors(model, kind))
  safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")
  with pytest.raises(ValueError, match=rf"(?s)other\.safetensors.*{words}") as error:
    stable_diffusion.open_model(tmp_path / "other.safetensors", configs=str(folder))
  assert len(str(error.value).splitlines()) <= 3


def test_what_a_single_file_needs(single, tokenizer):
  kind, _, folder, file = single
  with pytest.raises(ValueError, match=r"holds no tokenizer\n.*--tokenizer"):
    stable_diffusion.open_model(file)
  with pytest.raises(ValueError, match="configs: expected none with the folder"):
    stable_diffusion.open_model(folder, configs=str(folder))
  with pytest.raises(ValueError, match=r"expected the tokenizer's .*vocab\.json"):
    stable_diffusion.open_model(file, tokenizer=str(folder / "unet"))
  # Without configs it is taken for the published model, which this small one is not.
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    with pytest.raises(ValueError, match="its text_encoder does not fit the configuration"):
      stable_diffusion.open_model(file, tokenizer=str(tokenizer))
  assumed = {"1.x": "prediction_type epsilon", "2.x": "prediction_type v_prediction"}[kind]
  assert sum(assumed in str(w.message) for w in told) == 1


def test_a_single_file_on_the_command_line(single, command, tmp_path):
  kind, model, folder, file = single
  process = command("export", f"--model={file}", "--output=exported", cwd=tmp_path)
  _, errors = process.communicate()
  assert process.returncode == 1 and "Traceback" not in errors
  assert errors.startswith(f"error: {file} holds no tokenizer")
  if kind == "1.x":  # what the kinds differ in is not the command's business
    flags = (f"--model={file}", f"--configs={folder}", "--output=exported")
    process = command("export", *flags, cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    again = stable_diffusion.load(tmp_path / "exported").params
    jax.tree.map(np.testing.assert_array_equal, again, model.params)


# Tensors and numbers in the published files.
COUNTS = {
  "1.x": {"unet": (686, 859_520_964), "vae": (248, 83_653_863), "text_encoder": (196, 123_060_480)},
  "2.x": {"unet": (686, 865_910_724), "vae": (248, 83_653_863), "text_encoder": (372, 340_387_840)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_published_configs_have_the_published_sizes(kind, tokenizer):
  configs = published.CONFIGS[kind]
  shapes = stable_diffusion.build(**configs, tokenizer_folder=tokenizer).networks.param_shapes()
  for name, (tensors, numbers) in COUNTS[kind].items():
    leaves = jax.tree.leaves(shapes[name])
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (tensors, numbers)
    mapped = single_file.KINDS[kind][name].names(safetensors_io.torch_shapes(shapes[name]))
    assert len(set(mapped.values())) == tensors


@pytest.mark.slow
def test_the_published_xl_unet_has_the_published_size():
  network = unet.UNet2DConditionModel(unet.UNetConfig.from_dict(published.CONFIGS["xl"]["unet"]))
  added = {"text_embeds": jnp.zeros((1, 1280)), "time_ids": jnp.zeros((1, 6))}
  inputs = (jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 8, 2048)), added)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
  leaves = jax.tree.leaves(shapes)
  assert (len(leaves), sum(leaf.size for leaf in leaves)) == (1680, 2_567_463_684)
  vae.VAEConfig.from_dict(published.CONFIGS["xl"]["vae"])
