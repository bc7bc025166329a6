"""Language models of flow transformers, odd in one way: read as they should be, or refused."""

import warnings

import numpy as np
import odd_flows
import pytest
import small_flows

from jaxalign import files

TOWERS = {  # the language model's prefix, and what else there is in such files
  "model.": ("lm_head.weight", "visual.blocks.0.attn.qkv.weight"),
  "model.language_model.": ("lm_head.weight", "model.visual.blocks.0.attn.qkv.weight"),
  "language_model.model.": (
    *("language_model.lm_head.weight", "vision_tower.patch_conv.weight"),
    "multi_modal_projector.linear_1.weight",
  ),
  "_orig_mod.model.": ("_orig_mod.lm_head.weight",),
  "": ("lm_head.weight",),
}


@pytest.mark.parametrize("prefix", TOWERS)
@pytest.mark.parametrize("kind", ["z_image", "qwen_image"])
def test_a_language_model_under_any_prefix_is_the_same(copy_flow, sound_flow, kind, prefix):
  """Beside it may be a head, towers, and layers behind the last that is read."""
  folder = copy_flow(kind)
  file, tensors = odd_flows.tensors_of(folder, "text_encoder")
  model_type = files.read_json(folder / "text_encoder" / "config.json")["model_type"]
  start = len(small_flows.PREFIXES[model_type])
  named = {prefix + name[start:]: tensor for name, tensor in tensors.items()}
  assert f"{prefix}layers.2.mlp.up_proj.weight" in named  # which Z-Image does not read
  others = {name: np.ones((2, 3), np.float32) for name in TOWERS[prefix]}
  odd_flows.store({**named, **others}, file)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="a prompt has .* tokens")  # told once a process
    odd_flows.check_same(folder, sound_flow(kind))


def as_mistral(folder):
  """FLUX.2-dev's language model in the place of klein's; returns the tensors of the latter."""
  file, tensors = odd_flows.tensors_of(folder, "text_encoder")
  config = files.read_json(folder / "text_encoder" / "config.json")
  text = {**config, "model_type": "mistral", "sliding_window": None}
  both = {"model_type": "mistral3", "text_config": text, "vision_config": {"hidden_size": 8}}
  classes = {"architectures": ["Mistral3ForConditionalGeneration"]}
  files.write_json(folder / "text_encoder" / "config.json", {**both, **classes})
  index = folder / "model_index.json"
  entry = ["transformers", "Mistral3ForConditionalGeneration"]
  odd_flows.change(index, _class_name="Flux2Pipeline", text_encoder=entry)
  odd_flows.drop(index, "is_distilled")
  template = "{% for m in messages %}{{ m.role + ' ' + m.content[0].text }}{% endfor %}"
  (folder / "tokenizer" / "chat_template.jinja").write_text(template)
  named = {
    name.replace("model.", "language_model.model.", 1): tensor
    for name, tensor in tensors.items()
    if "q_norm" not in name and "k_norm" not in name
  }
  others = {name: np.ones((2, 3), np.float32) for name in TOWERS["language_model.model."]}
  odd_flows.store({**named, **others}, file)
  return tensors


def test_the_mistral_of_a_vision_language_model_is_read(copy_flow):
  folder = copy_flow("flux2")
  tensors = as_mistral(folder)
  found = odd_flows.read(odd_flows.open_model(folder))["text_encoder"]
  assert set(found) == {"embed_tokens", "layers_0", "layers_1", "layers_2"}
  for name in ("q_proj", "o_proj"):
    expected = tensors[f"model.layers.2.self_attn.{name}.weight"].T
    np.testing.assert_array_equal(found["layers_2"]["self_attn"][name]["kernel"], expected)
  assert set(found["layers_2"]["self_attn"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def shard(folder, variant=""):
  """The language model's file as two and an index, under the names that transformers gives."""
  file, tensors = odd_flows.tensors_of(folder, "text_encoder")
  dot = f".{variant}" if variant else ""
  shards = [f"model{dot}-0000{k}-of-00002.safetensors" for k in (1, 2)]
  weight_map = {name: shards[k % 2] for k, name in enumerate(sorted(tensors))}
  for shard in shards:
    own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
    odd_flows.store(own, file.with_name(shard))
  index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
  files.write_json(file.with_name(f"model.safetensors.index{dot}.json"), index)
  file.unlink()


@pytest.mark.parametrize("variant", ["", "fp16", "bf16"])
def test_a_sharded_language_model_is_the_same_and_saved_with_the_rest(
  copy_flow, sound_flow, variant, tmp_path
):
  folder = copy_flow("z_image")
  shard(folder, variant)
  model = odd_flows.check_same(folder, sound_flow("z_image"))
  model.files.save(odd_flows.read(model), tmp_path / "saved")
  odd_flows.check_same(tmp_path / "saved", sound_flow("z_image"))
  assert (tmp_path / "saved" / "text_encoder" / "model.safetensors.index.json").is_file()


def test_a_shard_that_is_missing_is_named(copy_flow):
  folder = copy_flow("z_image")
  shard(folder)
  (folder / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
  words = "lists model-00002-of-00002.safetensors for .* tensors, found no such"
  odd_flows.check_refused(words, folder)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_language_model_in_half_precision_is_read(copy_flow, variant):
  import ml_dtypes

  folder = copy_flow("qwen_image")
  file, tensors = odd_flows.tensors_of(folder, "text_encoder")
  dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[variant]
  halves = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  odd_flows.store(halves, file.with_name(f"model.{variant}.safetensors"))
  file.unlink()
  found = odd_flows.read(odd_flows.open_model(folder))["text_encoder"]["norm"]["scale"]
  name = next(name for name in tensors if name.endswith("language_model.norm.weight"))
  np.testing.assert_array_equal(found, halves[name].astype(np.float32))
  assert np.abs(found - tensors[name]).max() > 0.0


def test_a_file_with_more_layers_than_its_config_is_refused(copy_flow):
  """The last layer but one, which is read, would be another: as of a text encoder of any kind."""
  folder = copy_flow("z_image")
  odd_flows.change_text_config(folder, num_hidden_layers=2)
  odd_flows.check_refused("text_encoder.*num_hidden_layers|text_encoder.*unexpected", folder)


@pytest.mark.parametrize("kind", ["z_image", "qwen_image"])
def test_a_language_model_without_its_table_or_under_two_prefixes_is_refused(copy_flow, kind):
  folder = copy_flow(kind)
  original = odd_flows.tensors_of(folder, "text_encoder")[1]
  odd_flows.rename(folder, "text_encoder", lambda name: None if "embed_tokens" in name else name)
  words = "text_encoder.* does not fit its config.json"
  odd_flows.check_refused(f"{words}.*missing: embed_tokens", folder)
  table = next(name for name in original if name.endswith("embed_tokens.weight"))
  file = odd_flows.tensors_of(folder, "text_encoder")[0]
  odd_flows.store({**original, "other.embed_tokens.weight": original[table]}, file)
  odd_flows.check_refused("text_encoder.* does not fit its config.json", folder)


ROPES = {
  "of transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
  "of transformers 4": {"rope_theta": 50.0, "rope_scaling": None},
  "with a default scaling": {"rope_theta": 50.0, "rope_scaling": {"type": "default"}},
  "with both": {
    "rope_theta": 50.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
  },
  "with a scaling that is named twice": {
    "rope_theta": 50.0,
    "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 0]},
  },
}


@pytest.mark.parametrize("form", ROPES)
@pytest.mark.parametrize("kind", ["z_image", "qwen_image"])
def test_every_spelling_of_the_rotary_base_is_read(copy_flow, kind, form):
  folder = copy_flow(kind)
  odd_flows.change_text_config(folder, **{"rope_scaling": None, **ROPES[form]})
  text = odd_flows.text_of(odd_flows.open_model(folder, shapes_only=True))
  assert text.network.config.rope_theta == 50.0


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type"),
    ({"rope_parameters": "default"}, "rope_parameters"),
    ({"rope_scaling": [2.0]}, "rope_scaling"),
    ({"rope_parameters": {"rope_theta": "10000"}}, "rope_theta"),
    ({"layer_types": 3}, "layer_types"),
    ({"model_type": ["qwen3"]}, "model_type"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**13}, "rms_norm_eps"),
  ],
)
@pytest.mark.parametrize("kind", ["flux2", "z_image"])
def test_a_language_model_that_is_not_supported_is_refused(copy_flow, kind, fields, words):
  folder = copy_flow(kind)
  odd_flows.change_text_config(folder, **fields)
  odd_flows.check_refused(words, folder, shapes_only=True)


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "intermediate_size"])
def test_null_in_a_language_model_is_the_default(copy_flow, name):
  folder = copy_flow("z_image")
  odd_flows.change_text_config(folder, **{name: None})
  found = odd_flows.text_of(odd_flows.open_model(folder, shapes_only=True)).network.config
  odd_flows.drop(folder / "text_encoder" / "config.json", name)
  assert found == odd_flows.text_of(odd_flows.open_model(folder, shapes_only=True)).network.config


@pytest.mark.parametrize("half", ["qwen2_5_vl_text", [1], 3, True])
def test_a_text_config_that_is_none_is_refused(copy_flow, half):
  folder = copy_flow("qwen_image")
  odd_flows.change(folder / "text_encoder" / "config.json", text_config=half)
  odd_flows.check_refused("text_config|model_type", folder, shapes_only=True)


def test_a_language_model_that_is_quantised_as_a_whole_is_refused_by_name(copy_flow):
  """The field is beside text_config, not in it."""
  folder = copy_flow("qwen_image")
  config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
  odd_flows.change(folder / "text_encoder" / "config.json", quantization_config=config)
  words = "text_encoder/config.json.*found quantization_config"
  odd_flows.check_refused(words, folder, shapes_only=True)
