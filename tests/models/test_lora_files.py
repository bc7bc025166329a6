"""Adapter files: our own back bit for bit, everyone else's, and every way to be wrong."""

import json

import adapter_networks
import jax
import numpy as np
import pytest
import safetensors.numpy
from adapter_networks import store
from flax import traverse_util

from jaxalign.models.adapters import lora
from jaxalign.models.weights import lora_files, lora_names

BLOCK = ("mid_block", "attentions_0", "transformer_blocks_0", "attn1")
TO_Q, TO_OUT = (*BLOCK, "to_q"), (*BLOCK, "to_out_0")
CONV = ("down_blocks_0", "resnets_0", "conv1")
PROJ = ("mid_block", "attentions_0", "proj_in")
Q_PROJ = ("text_model", "encoder", "layers_0", "self_attn", "q_proj")
FC1 = ("text_model", "encoder", "layers_0", "mlp", "fc1")
MID = "mid_block.attentions.0"
ATTN = f"{MID}.transformer_blocks.0.attn1"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"
SELF_ATTN = "text_model.encoder.layers.0.self_attn"


@pytest.fixture(scope="module")
def shapes():
  made = adapter_networks.make()
  return {name: made[name] for name in ("unet", "text_encoder")}


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("rank", [1, 3])
def test_write_and_read_are_bit_exact(shapes, tmp_path, rank):
  zero = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes["unet"], rank=rank, targets=""))
  rng = np.random.default_rng(0)
  adapter = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), zero)
  path = lora_files.write(tmp_path, "unet", adapter)
  for source in (path, tmp_path):
    found = lora_files.read(source, shapes)
    assert found.unused == [] and set(found.adapters) == {"unet"}
    assert set(found.scales["unet"].values()) == {1.0}
    jax.tree.map(np.testing.assert_array_equal, found.adapters["unet"], adapter)
    jax.tree.map(np.testing.assert_array_equal, found.at_strength(1.0)["unet"], adapter)


def test_layouts_by_hand(tmp_path):
  a = np.zeros((3, 3, 2, 4), np.float32)
  a[0, 2, 1, 3] = 5.0
  b = np.arange(8, dtype=np.float32).reshape(4, 2)
  tree = {"conv_in": {"a": a, "b": b}, "add": {"a": a[0, 0], "b": b}}
  found = safetensors.numpy.load_file(lora_files.write(tmp_path, "unet", tree))
  assert found["unet.conv_in.lora_A.weight"].shape == (4, 2, 3, 3)
  assert found["unet.conv_in.lora_A.weight"][3, 1, 0, 2] == 5.0
  np.testing.assert_array_equal(found["unet.conv_in.lora_B.weight"], b.T[:, :, None, None])
  np.testing.assert_array_equal(found["unet.add.lora_A.weight"], a[0, 0].T)
  np.testing.assert_array_equal(found["unet.add.lora_B.weight"], b.T)


# Names of the two matrices, and the layer they are of.
SPELLINGS = {
  "peft": (f"unet.{ATTN}.to_q.lora_A.weight", f"unet.{ATTN}.to_q.lora_B.weight", TO_Q),
  "diffusers": (f"unet.{ATTN}.to_q.lora.down.weight", f"unet.{ATTN}.to_q.lora.up.weight", TO_Q),
  "processor": (
    f"unet.{ATTN}.processor.to_out_lora.down.weight",
    f"unet.{ATTN}.processor.to_out_lora.up.weight",
    TO_OUT,
  ),
  "no prefix": (
    f"{ATTN}.processor.to_q_lora.down.weight",
    f"{ATTN}.processor.to_q_lora.up.weight",
    TO_Q,
  ),
  "peft folder": (
    f"base_model.model.{ATTN}.to_out.0.lora_A.weight",
    f"base_model.model.{ATTN}.to_out.0.lora_B.weight",
    TO_OUT,
  ),
  "kohya": (f"{KOHYA}_to_out_0.lora_down.weight", f"{KOHYA}_to_out_0.lora_up.weight", TO_OUT),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer(shapes, tmp_path, spelling):
  down, up, layer = SPELLINGS[spelling]
  tensors = {down: draw(2, 16), up: draw(16, 2, seed=1)}
  found = lora_files.read(store(tmp_path / "a.safetensors", tensors), shapes)
  assert found.unused == []
  leaves = traverse_util.flatten_dict(found.adapters["unet"])
  assert set(leaves) == {(*layer, "a"), (*layer, "b")}
  np.testing.assert_array_equal(leaves[(*layer, "a")], tensors[down].T)
  np.testing.assert_array_equal(leaves[(*layer, "b")], tensors[up].T)


@pytest.mark.parametrize(
  ("name", "layer"),
  [
    (f"text_encoder.{SELF_ATTN}.q_proj.lora_A.weight", Q_PROJ),
    ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight", Q_PROJ),
    (f"text_encoder.{SELF_ATTN}.to_q_lora.down.weight", Q_PROJ),
    (f"text_encoder.{SELF_ATTN}.q_proj.lora_linear_layer.down.weight", Q_PROJ),
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", Q_PROJ),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", FC1),
  ],
)
def test_every_spelling_of_a_text_encoders_layer(shapes, name, layer):
  paths = [path for path, _ in lora.adaptable_layers(shapes["text_encoder"])]
  entry = lora_names.parse(name)
  assert (entry.component, entry.part) == ("text_encoder", "a")
  assert lora_names.layer_paths("text_encoder", paths)[entry.layer] == layer


def test_no_two_layers_share_a_spelling(shapes):
  for name, tree in shapes.items():
    paths = [path for path, _ in lora.adaptable_layers(tree)]
    found = lora_names.layer_paths(name, paths)
    per_layer = [lora_names.layer_paths("", [path]) for path in paths]
    assert set(found.values()) == set(paths)
    assert all(found[alias] == path for of in per_layer for alias, path in of.items())
    assert sum(map(len, per_layer)) == len(set().union(*per_layer))


def test_kohya_alphas_and_convolutions(shapes, tmp_path):
  tensors = {
    f"{KOHYA}_to_q.lora_down.weight": draw(4, 16).astype(np.float16),
    f"{KOHYA}_to_q.lora_up.weight": draw(16, 4, seed=1).astype(np.float16),
    f"{KOHYA}_to_q.alpha": np.float16(1.0),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": draw(2, 8, 3, 3),
    "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": draw(8, 2, 1, 1),
    "lora_unet_down_blocks_0_resnets_0_conv1.alpha": np.int64(6),
    # A 1 x 1 convolution stored as a matrix, and a matrix as a 1 x 1 convolution.
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": draw(1, 16),
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": draw(16, 1),
    f"{KOHYA}_to_out_0.lora_down.weight": draw(3, 16, 1, 1),
    f"{KOHYA}_to_out_0.lora_up.weight": draw(16, 3, 1, 1),
  }
  found = lora_files.read(store(tmp_path / "kohya.safetensors", tensors), shapes)
  assert found.scales["unet"] == {TO_Q: 0.25, CONV: 3.0, PROJ: 1.0, TO_OUT: 1.0}
  leaves = traverse_util.flatten_dict(found.at_strength(2.0)["unet"])
  expected = {(*CONV, "a"): (3, 3, 8, 2), (*CONV, "b"): (2, 8), (*PROJ, "a"): (1, 1, 16, 1)}
  for path, shape in expected.items():
    assert leaves[path].shape == shape
  assert leaves[(*TO_Q, "b")].dtype == np.float32
  up = tensors[f"{KOHYA}_to_q.lora_up.weight"].astype(np.float32)
  np.testing.assert_array_equal(leaves[(*TO_Q, "b")], 0.5 * up.T)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes["unet"])
  merged = lora.merge(zeros, found.at_strength(1.0)["unet"])
  assert merged["down_blocks_0"]["resnets_0"]["conv1"]["kernel"].shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
  ("config", "scale"),
  [
    ({"lora_alpha": 8}, 2.0),
    ({"lora_alpha": 8, "use_rslora": True}, 4.0),
    ({"lora_alpha": 8, "alpha_pattern": {"to_k": 1, "attn1.to_q": 2, "to_q": 3}}, 0.5),
    ({"lora_alpha": 8, "alpha_pattern": {"^mid_block.*q": 12}}, 3.0),
    ({"lora_alpha": 8, "alpha_pattern": {"o_q": 12}}, 2.0),
    ({}, 1.0),
  ],
)
def test_the_scale_of_pefts_configuration(shapes, tmp_path, config, scale):
  names = [name.format(f"{ATTN}.to_q") for name in ("{}.lora_A.weight", "{}.lora_B.weight")]
  tensors = [draw(4, 16), draw(16, 4)]
  header = {f"unet.{key}": value for key, value in config.items()}
  header["text_encoder.lora_alpha"] = 99
  store(
    tmp_path / "a.safetensors",
    {f"unet.{name}": tensor for name, tensor in zip(names, tensors, strict=True)},
    {"lora_adapter_metadata": json.dumps(header)},
  )
  found = lora_files.read(tmp_path / "a.safetensors", shapes)
  assert found.scales["unet"][TO_Q] == pytest.approx(scale)
  folder = tmp_path / "peft"
  folder.mkdir()
  named = {f"base_model.model.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
  store(folder / "adapter_model.safetensors", named)
  (folder / "adapter_config.json").write_text(json.dumps(config))
  assert lora_files.read(folder, shapes).scales["unet"][TO_Q] == pytest.approx(scale)


def test_what_fits_nowhere_is_named(shapes, tmp_path):
  tensors = {
    f"unet.{ATTN}.to_q.lora_A.weight": draw(2, 16),
    f"unet.{ATTN}.to_q.lora_B.weight": draw(16, 2),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": draw(2, 16),
    "unet.mid_block.attentions.7.proj_in.lora_A.weight": draw(2, 16),
    "epoch": np.float32(3.0),
  }
  found = lora_files.read(store(tmp_path / "a.safetensors", tensors), shapes)
  assert sorted(found.unused) == sorted(list(tensors)[2:])


GOOD = {
  f"unet.{ATTN}.to_q.lora_A.weight": draw(2, 16),
  f"unet.{ATTN}.to_q.lora_B.weight": draw(16, 2),
}


@pytest.mark.parametrize(
  ("tensors", "words"),
  [
    ({"transformer.blocks.0.lora_A.weight": draw(2, 2)}, "fits no layer of this model.*\n.*blocks"),
    ({}, "its tensors: none"),
    (dict(list(GOOD.items())[:1]), "only one of its two matrices"),
    ({**GOOD, f"unet.{ATTN}.to_q.lora_B.weight": draw(8, 2)}, r"\(16, 2\), found .*\(8, 2\)"),
    ({**GOOD, f"unet.{ATTN}.to_q.lora_B.weight": draw(16, 3)}, "is it for another model"),
    ({**GOOD, f"unet.{ATTN}.to_q.lora_magnitude_vector": draw(16)}, "holds DoRA adapters"),
    ({f"{KOHYA}_to_q.hada_w1_a": draw(2, 2)}, "holds LoHa adapters"),
    ({f"{KOHYA}_to_q.lokr_w1": draw(2, 2)}, "holds LoKr adapters"),
    ({f"{KOHYA}_to_q.lora_mid.weight": draw(2, 2)}, "middle matrix"),
    ({**GOOD, f"unet.{ATTN}.to_q.lora_B.bias": draw(16)}, "LoRA with biases"),
  ],
)
def test_what_cannot_be_applied_is_refused(shapes, tmp_path, tensors, words):
  path = store(tmp_path / "a.safetensors", tensors)
  with pytest.raises(ValueError, match=rf"(?s)a\.safetensors.*{words}") as error:
    lora_files.read(path, shapes)
  assert len(str(error.value).splitlines()) <= 3


def test_files_that_are_not_there_or_not_readable(shapes, tmp_path):
  with pytest.raises(ValueError, match=r"found no \.safetensors file in the folder"):
    lora_files.read(tmp_path, shapes)
  (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04")
  with pytest.raises(ValueError, match=r"pytorch_lora_weights\.bin, a pickle"):
    lora_files.read(tmp_path, shapes)
  with pytest.raises(ValueError, match=r"pytorch_lora_weights\.bin, a pickle"):
    lora_files.read(tmp_path / "pytorch_lora_weights.bin", shapes)
  store(tmp_path / "one.safetensors", GOOD)
  assert lora_files.read(tmp_path, shapes).unused == []
  store(tmp_path / "two.safetensors", GOOD)
  with pytest.raises(ValueError, match=r"found 2 \.safetensors files"):
    lora_files.read(tmp_path, shapes)
  content = (tmp_path / "one.safetensors").read_bytes()
  (tmp_path / "one.safetensors").write_bytes(content[:-8])
  with pytest.raises(ValueError, match=r"one.safetensors is cut short"):
    lora_files.read(tmp_path / "one.safetensors", shapes)
  store(tmp_path / "two.safetensors", GOOD, {"lora_adapter_metadata": "[3"})
  with pytest.raises(ValueError, match="lora_adapter_metadata is no JSON object"):
    lora_files.read(tmp_path / "two.safetensors", shapes)


def test_kohyas_names_of_xl(shapes):
  paths = [path for path, _ in lora.adaptable_layers(shapes["unet"])]
  known = lora_names.layer_paths("unet", paths)
  for name, layer in {
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight": TO_Q,
    "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": CONV,
    "lora_unet_time_embed_0.alpha": ("time_embedding", "linear_1"),
    "lora_unet_output_blocks_1_1_conv.alpha": ("up_blocks_0", "upsamplers_0", "conv"),
  }.items():
    assert known[lora_names.parse(name).layer] == layer


def test_kohya_names_as_diffusers_reads_them(shapes):
  """The oracle: diffusers' own conversion of the same names, for every layer of the network."""
  conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
  torch = pytest.importorskip("torch")
  from diffusers.utils import state_dict_utils

  paths = [path for path, _ in lora.adaptable_layers(shapes["unet"])]
  plain = ("to_q", "to_k", "to_v", "to_out_0", "proj_in")
  attention = [path for path in paths if path[-1] in plain]
  tensors = {}
  for number, path in enumerate(attention):
    name = "lora_unet_" + lora_names.module_name(path).replace(".", "_")
    tensors[f"{name}.lora_down.weight"] = torch.full((1, 1), float(number))
    tensors[f"{name}.lora_up.weight"] = torch.full((1, 1), float(number))
  converted, _ = conversion._convert_non_diffusers_lora_to_diffusers(dict(tensors))
  converted = state_dict_utils.convert_unet_state_dict_to_peft(converted)
  known = lora_names.layer_paths("unet", paths)
  for name, tensor in converted.items():
    assert known[lora_names.parse(name).layer] == attention[int(tensor.item())]
  for name, tensor in tensors.items():
    assert known[lora_names.parse(name).layer] == attention[int(tensor.item())]
