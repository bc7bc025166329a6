"""Adapters that fit are applied, at the strength that was meant, and never in part.

The situations are of public reports, each named; the files are our own.
"""

import json

import adapter_networks
import numpy as np
import pytest
from adapter_networks import layers, pair, store
from flax import traverse_util

from jaxalign.models.weights import lora_files, lora_names, lora_scales, tensor_files

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL_Q = "middle_block.1.transformer_blocks.0.attn1.to_q"
KOHYA_Q = "lora_unet_" + Q.replace(".", "_")
TEXT_Q = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def networks():
  return adapter_networks.make()


def one_layer(networks, component, names, **options):
  """The tensors of an adapter of one layer under the given names of A and B."""
  module = Q if component == "unet" else TEXT_Q
  return dict(zip(names, pair(layers(networks[component])[module], **options), strict=True))


def path_of(component):
  block = "mid_block/attentions_0/transformer_blocks_0/attn1/to_q"
  text = "text_model/encoder/layers_0/self_attn/q_proj"
  return tuple((block if component == "unet" else text).split("/"))


# What a file calls A and B of one layer; {} is "A" or "B", [] "down" or "up".
SPELLINGS = {
  # huggingface/diffusers#11675, #6382, #11790: the state of a PEFT model, saved as it is.
  "the adapter's name": ("unet", f"{Q}.lora_{{}}.default_0.weight"),
  "PEFT's prefix and name": ("unet", f"base_model.model.{Q}.lora_{{}}.default.weight"),
  "a component before PEFT's prefix": ("unet", f"unet.base_model.model.{Q}.lora_{{}}.weight"),
  # huggingface/diffusers PR#5958: a folder for each network.
  "PEFT's text encoder": ("text_encoder", f"base_model.model.{TEXT_Q}.lora_{{}}.weight"),
  "PEFT's second text encoder": ("text_encoder_2", f"base_model.model.{TEXT_Q}.lora_{{}}.weight"),
  # MakazhanAlpamys/Soup#335, huggingface/peft#2957: torch.compile.
  "compiled": ("unet", f"_orig_mod.base_model.model.{Q}.lora_{{}}.weight"),
  "compiled by region": (
    "unet", f"unet.{Q.replace('.attn1', '._orig_mod.attn1')}.lora_{{}}.weight"
  ),
  # kohya-ss/sd-scripts PR#1024: the same under kohya's names.
  "compiled by kohya": ("unet", f"lora_unet__orig_mod_{Q.replace('.', '_')}.lora_[].weight"),
  # jingyaogong/minimind PR#594: DistributedDataParallel.
  "distributed": ("text_encoder", f"text_encoder.module.{TEXT_Q}.lora_{{}}.weight"),
  "distributed and compiled": ("unet", f"module._orig_mod.{Q}.lora_{{}}.default.weight"),
  # Comfy-Org/ComfyUI's own LoRA files; invoke-ai/InvokeAI PR#6267 for underscores.
  "ComfyUI": ("unet", f"diffusion_model.{ORIGINAL_Q}.lora_[].weight"),
  "its text encoders": (
    "text_encoder_2", f"text_encoders.clip_g.transformer.{TEXT_Q}.lora_[].weight"
  ),
  "underscores after diffusion_model": (
    "unet", f"diffusion_model_{ORIGINAL_Q.replace('.', '_')}.lora_[].weight"
  ),
  # Nerogar/OneTrainer's three ways of writing.
  "OneTrainer, dots": ("unet", f"lora_unet.{Q}.lora_[].weight"),
  "OneTrainer, OMI": ("unet", f"unet.{ORIGINAL_Q}.lora_[].weight"),
  "OneTrainer, OMI, text": ("text_encoder", f"clip_l.{TEXT_Q}.lora_[].weight"),
  # Comfy-Org/ComfyUI#3494: underscores up to the attention, and dots after it.
  "in part": ("unet", KOHYA_Q.replace("_to_q", ".to_q") + ".lora_[].weight"),
  "no weight at the end": ("unet", f"unet.{Q}.lora_{{}}"),
  "LyCORIS without a network": ("unet", f"lycoris_{Q.replace('.', '_')}.lora_[].weight"),
  "under another network's prefix": ("text_encoder", f"unet.{TEXT_Q}.lora_{{}}.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_applied_to_the_network_that_it_fits(networks, tmp_path, spelling):
  component, pattern = SPELLINGS[spelling]
  names = [
    pattern.replace("{}", letter).replace("[]", word)
    for letter, word in (("A", "down"), ("B", "up"))
  ]
  tensors = one_layer(networks, component, names)
  found = lora_files.read(store(tmp_path / "a.safetensors", tensors), networks)
  assert found.unused == [] and list(found.adapters) == [component]
  leaves = traverse_util.flatten_dict(found.adapters[component])
  assert set(leaves) == {(*path_of(component), "a"), (*path_of(component), "b")}
  np.testing.assert_array_equal(leaves[(*path_of(component), "a")], tensors[names[0]].T)
  np.testing.assert_array_equal(leaves[(*path_of(component), "b")], tensors[names[1]].T)


def test_every_module_has_spellings_of_its_own(networks):
  """Norms and embeddings too, which tensors that are no adapters are looked for among."""
  for component, tree in networks.items():
    paths = list({path[:-1] for path in traverse_util.flatten_dict(tree)})
    found = lora_names.layer_paths(component, paths)
    per_layer = [lora_names.layer_paths("", [path]) for path in paths]
    assert sum(map(len, per_layer)) == len(set().union(*per_layer))
    assert all(found[alias] == path for of in per_layer for alias, path in of.items())


def test_all_layers_of_both_text_encoders_without_a_prefix(networks, tmp_path):
  """Alike in names, told apart by their shapes; where these do not decide the file is refused."""
  for component in ("text_encoder", "text_encoder_2"):
    tensors = {}
    for name, shape in layers(networks[component]).items():
      for letter, matrix in zip("AB", pair(shape), strict=True):
        tensors[f"{name}.lora_{letter}.weight"] = matrix
    found = lora_files.read(store(tmp_path / "a.safetensors", tensors), networks)
    assert list(found.adapters) == [component] and found.unused == []
  twins = {"text_encoder": networks["text_encoder"], "text_encoder_2": networks["text_encoder"]}
  tensors = one_layer(twins, "text_encoder", [f"{TEXT_Q}.lora_{x}.weight" for x in "AB"])
  with pytest.raises(ValueError, match="fits text_encoder and text_encoder_2 alike"):
    lora_files.read(store(tmp_path / "a.safetensors", tensors), twins)


def test_a_network_that_the_model_lacks_lends_its_adapter_to_no_other(networks, tmp_path):
  """kohya-ss/sd-scripts: an adapter of XL on a model with one text encoder of the same width."""
  alone = {name: networks[name] for name in ("unet", "text_encoder")}
  names = [f"lora_te2_{TEXT_Q.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")]
  tensors = one_layer(networks, "text_encoder", names)
  tensors |= one_layer(networks, "unet", [f"{KOHYA_Q}.lora_{x}.weight" for x in ("down", "up")])
  found = lora_files.read(store(tmp_path / "a.safetensors", tensors), alone)
  assert list(found.adapters) == ["unet"] and sorted(found.unused) == sorted(names)


def test_two_adapters_in_one_file_are_refused(networks, tmp_path):
  """huggingface/peft: a model with two adapters, whose state is saved as it is."""
  tensors = {}
  for name in ("default", "style"):
    tensors |= one_layer(networks, "unet", [f"unet.{Q}.lora_{x}.{name}.weight" for x in "AB"])
  with pytest.raises(ValueError, match=r"one adapter, found .*lora_A\.default.* and .*\.style"):
    lora_files.read(store(tmp_path / "a.safetensors", tensors), networks)


NORM = "mid_block.attentions.0.transformer_blocks.0.norm1"
# What Nerogar/OneTrainer, KohakuBlueleaf/LyCORIS, Comfy-Org/ComfyUI and PEFT write beside LoRA.
EXTRAS = [
  (f"{KOHYA_Q}.diff_b", "differences of whole weights or biases"),
  (f"lora_unet_{NORM.replace('.', '_')}.w_norm", "differences of norms"),
  (f"diffusion_model.{ORIGINAL_Q}.diff", "differences of whole weights"),
  ("bundle_emb.my-cat.clip_l", "embeddings of new tokens"),
  (f"{KOHYA_Q}.oft_blocks", "OFT adapters"),
  (f"{KOHYA_Q}.on_input", "IA3 adapters"),
  (f"{KOHYA_Q}.a1.weight", "GLoRA adapters"),
  (f"unet.{Q}.lora_E.default", "AdaLoRA adapters"),
  (f"unet.{Q}.lora_B.default.bias", "LoRA with biases"),
  (f"text_encoder.{TEXT_Q.replace('encoder.layers.0.self_attn.q_proj', 'embeddings')}"
   ".token_embedding.lora_embedding_A.default", "LoRA of embeddings"),
  (f"base_model.model.{Q}.bias", "is no part of LoRA"),
  ("base_model.model.conv_in.modules_to_save.default.weight", "conv_in and is no part of LoRA"),
  (f"unet.{Q}.base_layer.weight", "is no part of LoRA"),
  (f"{KOHYA_Q}.scale", "is no part of LoRA"),
  (f"unet.{NORM}.lora_A.weight", "of a kind that has no adapters here"),
]


@pytest.mark.parametrize(("extra", "words"), EXTRAS, ids=[name for name, _ in EXTRAS])
def test_what_would_be_left_out_is_named(networks, tmp_path, extra, words):
  tensors = one_layer(networks, "unet", [f"{KOHYA_Q}.lora_{x}.weight" for x in ("down", "up")])
  lora_files.read(store(tmp_path / "good.safetensors", tensors), networks)
  tensors[extra] = np.ones(16, np.float32)
  with pytest.raises(ValueError) as caught:
    lora_files.read(store(tmp_path / "a.safetensors", tensors), networks)
  message = str(caught.value)
  assert words in message and extra in message and "--model" in message
  assert len(message.splitlines()) == 2


# ---- scales

# (metadata of the header, adapter_config.json, scale at rank 4, what says so)
ALPHAS = {
  # sgl-project/sglang PR#36082, #35952; Comfy-Org/ComfyUI PR#15830; bghira/SimpleTuner PR#1853.
  "lora_alpha": ({"lora_alpha": "8"}, None, 2.0, "lora_alpha in the header"),
  "alpha": ({"alpha": "8.0"}, None, 2.0, "alpha in the header"),
  "of a component": ({"unet.lora_alpha": "2"}, None, 0.5, "unet.lora_alpha in the header"),
  "of another": ({"text_encoder.lora_alpha": "2"}, None, 1.0, "no alpha given"),
  "kohya": ({"ss_network_alpha": "1", "ss_network_dim": "4"}, None, 0.25, "ss_network_alpha"),
  "kohya's None": ({"ss_network_alpha": "None"}, None, 1.0, "no alpha given"),
  "twice the same": ({"alpha": "8", "lora_alpha": "8.0"}, None, 2.0, "in the header"),
  "beside": ({}, {"lora_alpha": 16}, 4.0, "adapter_config.json"),
  "beside and in the header": ({"alpha": "16"}, {"lora_alpha": 16}, 4.0, "adapter_config.json"),
  "rslora": ({}, {"lora_alpha": 8, "use_rslora": True}, 4.0, "adapter_config.json"),
}


@pytest.mark.parametrize("case", ALPHAS)
def test_an_alpha_that_no_tensor_holds_is_applied_and_said(networks, tmp_path, case):
  metadata, config, scale, said = ALPHAS[case]
  tensors = one_layer(networks, "unet", [f"unet.{Q}.lora_{x}.weight" for x in "AB"], rank=4)
  path = store(tmp_path / "any_name.safetensors", tensors, metadata)
  if config is not None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  found = lora_files.read(path, networks)
  assert found.scales["unet"] == {path_of("unet"): scale}
  assert found.in_words().startswith("1 layers of unet; ") and said in found.in_words()
  b = tensors[f"unet.{Q}.lora_B.weight"].T
  applied = traverse_util.flatten_dict(found.at_strength(1.0)["unet"])[(*path_of("unet"), "b")]
  np.testing.assert_array_equal(applied, b * np.float32(scale))


def test_an_alpha_that_a_tensor_holds_comes_first(networks, tmp_path):
  """huggingface/diffusers PR#14408: a file with both is scaled once."""
  tensors = one_layer(networks, "unet", [f"{KOHYA_Q}.lora_{x}.weight" for x in ("down", "up")])
  tensors[f"{KOHYA_Q}.alpha"] = np.float32(1.0)
  other = KOHYA_Q.replace("to_q", "to_k")
  tensors |= one_layer(networks, "unet", [f"{other}.lora_{x}.weight" for x in ("down", "up")])
  path = store(tmp_path / "a.safetensors", tensors, {"ss_network_alpha": "4"})
  found = lora_files.read(path, networks)
  assert sorted(found.scales["unet"].values()) == [0.5, 2.0]
  assert "alpha by its tensors (1)" in found.in_words()


@pytest.mark.parametrize(
  ("metadata", "config", "words"),
  [
    ({"lora_alpha": "nan"}, None, "header: expected a finite number, found 'nan'"),
    ({"lora_alpha": "eight"}, None, "expected a finite number, found 'eight'"),
    ({"alpha": "8", "ss_network_alpha": "4"}, None, r"one alpha in the header, found 8 \(.*4"),
    ({"alpha": "8"}, {"lora_alpha": 16}, "expected one alpha, found 16"),
    ({}, {"lora_alpha": float("inf")}, "adapter_config.json: lora_alpha: .*found 'inf'"),
    ({}, {"lora_alpha": True}, "found 'True'"),
    ({}, {"lora_alpha": 1, "alpha_pattern": {"(": 1}}, "is no expression"),
    ({}, {"lora_alpha": 1, "alpha_pattern": [1]}, "to be an object"),
    ({}, {"lora_alpha": 1, "alpha_pattern": {"to_q": None}}, "found 'None'"),
    ({}, {"lora_alpha": 1, "use_rslora": "yes"}, "true or false"),
    ({}, {"peft_type": "OFT"}, "expected peft_type LORA, found 'OFT'"),
    # huggingface/peft's PiSSA: the matrices are of a model that has lost its principal components.
    ({}, {"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"lora_adapter_metadata": "[[1, 2]]"}, None, "no JSON object"),
    ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, None, "found 'nan'"),
  ],
)
def test_what_says_nothing_certain_of_the_scale_is_refused(
  networks, tmp_path, metadata, config, words
):
  tensors = one_layer(networks, "unet", [f"unet.{Q}.lora_{x}.weight" for x in "AB"], rank=4)
  path = store(tmp_path / "a.safetensors", tensors, metadata)
  if config is not None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=words) as caught:
    lora_files.read(path, networks)
  assert len(str(caught.value).splitlines()) <= 3


def test_a_configuration_among_several_files_is_of_none_but_pefts(networks, tmp_path):
  tensors = one_layer(networks, "unet", [f"unet.{Q}.lora_{x}.weight" for x in "AB"], rank=4)
  (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
  for name in ("adapter_model", "other"):
    store(tmp_path / f"{name}.safetensors", tensors)
  scales = [
    lora_files.read(tmp_path / f"{name}.safetensors", networks).scales["unet"][path_of("unet")]
    for name in ("adapter_model", "other")
  ]
  assert scales == [2.0, 1.0]
  assert lora_scales.configurations(tensor_files.open_file(tmp_path / "other.safetensors")) == {}


# ---- the oracles


def deltas(found, component):
  """What an adapter adds to each layer, `{PyTorch name: [out, in]}`, of linear layers."""
  leaves = traverse_util.flatten_dict(found.at_strength(1.0)[component])
  return {
    lora_names.module_name(layer): (leaf @ leaves[(*layer, "b")]).T
    for (*layer, part), leaf in leaves.items()
    if part == "a" and leaf.ndim == 2
  }


def peft_model(kind):
  """A network of transformers or diffusers with two PEFT adapters, of ranks 3 and 2."""
  import diffusers
  import peft
  import torch
  import transformers

  torch.manual_seed(0)
  if kind == "unet":
    network = diffusers.UNet2DConditionModel(**adapter_networks.UNET)
    targets = ["to_q", "to_out.0", "ff.net.2"]
  else:
    network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**adapter_networks.TEXT))
    targets = ["q_proj", "out_proj", "fc1"]
  config = peft.LoraConfig(
    r=3, lora_alpha=5, use_rslora=kind == "unet", target_modules=targets,
    alpha_pattern={targets[0]: 7}, init_lora_weights="gaussian",
  )
  model = peft.get_peft_model(network, config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_B" in name:
        parameter.normal_()
  return model


@pytest.mark.parametrize("kind", ["unet", "text_encoder"])
def test_pefts_own_folders_add_what_peft_adds(networks, tmp_path, kind):
  """huggingface/diffusers PR#5958, luosiallen/latent-consistency-model#57: scale and all."""
  pytest.importorskip("peft")
  model = peft_model(kind)
  model.save_pretrained(tmp_path / "folder")
  state = {name: x.detach().numpy() for name, x in model.state_dict().items() if "lora_" in name}
  (tmp_path / "raw").mkdir()
  store(tmp_path / "raw" / "state.safetensors", state)
  (tmp_path / "raw" / "adapter_config.json").write_bytes(
    (tmp_path / "folder" / "adapter_config.json").read_bytes()
  )
  expected = {
    name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
    for name, module in model.named_modules()
    if hasattr(module, "get_delta_weight")
  }
  if kind == "text_encoder":
    expected = {f"text_model.{n.removeprefix('text_model.')}": x for n, x in expected.items()}
  for folder in ("folder", "raw"):
    found = lora_files.read(tmp_path / folder, networks)
    assert list(found.adapters) == [kind] and found.unused == []
    ours = deltas(found, kind)
    assert ours.keys() == expected.keys() and len(ours) >= 3
    for name, delta in ours.items():
      np.testing.assert_allclose(delta, expected[name], rtol=2e-6, atol=2e-6)


def test_originals_names_with_dots_as_kohyas_conversion_reads_them(networks, tmp_path):
  """ComfyUI's names and kohya's are one network's: the same layers for the same tensors."""
  names = lora_names.original.unet({f"{name}.weight" for name in layers(networks["unet"])})
  files = {}
  for style in ("kohya", "ComfyUI"):
    tensors = {}
    for number, (name, shape) in enumerate(sorted(layers(networks["unet"]).items())):
      source = names[f"{name}.weight"].name.removesuffix(".weight")
      source = "lora_unet_" + source.replace(".", "_") if style == "kohya" else (
        f"model.diffusion_model.{source}"
      )
      for word, matrix in zip(("down", "up"), pair(shape, seed=number), strict=True):
        tensors[f"{source}.lora_{word}.weight"] = matrix
    files[style] = lora_files.read(store(tmp_path / f"{style}.safetensors", tensors), networks)
  assert files["ComfyUI"].unused == [] and len(files["kohya"].scales["unet"]) == len(names)
  for ours, theirs in zip(*(deltas(file, "unet").items() for file in files.values()), strict=True):
    assert ours[0] == theirs[0]
    np.testing.assert_array_equal(ours[1], theirs[1])
