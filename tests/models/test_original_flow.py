"""Original names of SD3's and FLUX's tensors: diffusers' conversion is the oracle."""

import types

import jax
import numpy as np
import original_files
import pytest
import torch_trees
from original_flow_files import MODULES, changed, made, without

from jaxalign.models.weights import (
  lazy,
  original,
  original_flow,
  original_flux,
  original_sd3,
  safetensors_io,
  tensor_files,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")
oracle = pytest.importorskip("diffusers.loaders.single_file_utils")

PREFIX = "model.diffusion_model."
NAMES = {"sd3": original_sd3.sd3, "flux1": original_flux.flux1, "flux2": original_flux.flux2}


@pytest.fixture(params=MODULES)
def model(request):
  return made(request.param)


def convert(kind, tensors, width):
  """By diffusers, in whose code the width of FLUX.1 is a constant."""
  if kind == "sd3":
    return oracle.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
  if kind == "flux2":
    return oracle.convert_flux2_transformer_checkpoint_to_diffusers(tensors)
  code = oracle.convert_flux_transformer_checkpoint_to_diffusers.__code__
  assert code.co_consts.count(3072) == 1
  constants = tuple(width if constant == 3072 else constant for constant in code.co_consts)
  return types.FunctionType(code.replace(co_consts=constants), vars(oracle))(tensors)


def test_diffusers_converts_the_file_that_is_made_here(model):
  kind, _, tensors, file = model
  found = convert(kind, dict(file), 128)
  assert found.keys() == tensors.keys()
  assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def write(path, tensors):
  safetensors_torch.save_file({n: x.contiguous() for n, x in tensors.items()}, path)
  return tensor_files.open_file(path).tensors


def load(kind, tensors, expected):
  own = original_flow.renamed(NAMES[kind], tensors, safetensors_io.torch_shapes(expected))
  return jax.tree.map(np.asarray, safetensors_io.to_tree("file: it does not fit", own, expected))


def test_a_file_is_the_folder_bit_for_bit(model, tmp_path):
  kind, _, tensors, file = model
  expected = torch_trees.to_tree(tensors)
  of_folder = safetensors_io.to_tree("", write(tmp_path / "folder", tensors), expected)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, of_folder), expected)
  found = load(kind, write(tmp_path / "file", file), expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_other_components_half_precision_and_comfy_s_norms(model, tmp_path):
  """As tools write a transformer into a file with more."""
  kind, _, tensors, file = model
  stored = {PREFIX + name.replace("_norm.scale", "_norm.weight"): x for name, x in file.items()}
  stored |= {"first_stage_model.decoder.conv_in.bias": torch.zeros(3)}
  halves = {name: tensor.bfloat16() for name, tensor in stored.items()}
  expected = torch_trees.to_tree({name: x.bfloat16() for name, x in tensors.items()})
  found = load(kind, write(tmp_path / "file", halves), expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


MISFITS = [
  ("sd3", without("joint_blocks.1.x_block.attn.qkv.bias"), "3 missing: .*blocks.1.attn.to_k.bias"),
  ("sd3", without("pos_embed"), "1 missing: pos_embed.pos_embed"),
  ("sd3", changed("joint_blocks.9.x_block.mlp.fc1.bias", 2), "1 unexpected: joint_blocks.9.x_bl"),
  ("sd3", changed("joint_blocks.0.x_block.attn.qkv.bias", 64), "qkv.bias: expected 192 rows.* 64"),
  ("sd3", changed("norm_out.linear.bias", 128), "each weight once, found final_layer.*norm_out.li"),
  ("flux1 dev", without("guidance_in.in_layer.bias"), "1 missing: .*guidance_embedder.linear_1"),
  ("flux1 dev", without("single_blocks.0.linear1.weight"), "4 missing: .*_blocks.0.attn.to_k.we"),
  ("flux1 dev", changed("single_blocks.1.linear1.bias", 900), "linear1.bias: expected 896.* 900"),
  ("flux1 dev", changed("img_in.bias", 3), r"1 misshapen: x_embedder.bias \(3,\) instead"),
  ("flux1 schnell", changed("guidance_in.in_layer.bias", 128), "1 unexpected: guidance_in.in_la"),
  ("flux2 klein", without("single_stream_modulation.lin.weight"), "1 missing: single_stream_mod"),
  ("flux2 klein", changed("img_in.bias", 128), "1 unexpected: img_in.bias"),
  ("flux2 dev", changed("final_layer.adaLN_modulation.1.weight", (255, 128)), "1 misshapen: norm_"),
]


@pytest.mark.parametrize(("name", "change", "words"), MISFITS)
def test_files_that_do_not_fit(tmp_path, name, change, words):
  kind, _, tensors, file = made(name)
  with pytest.raises(ValueError, match=words) as error:
    load(kind, write(tmp_path / "file", change(file)), torch_trees.to_tree(tensors))
  assert len(str(error.value).splitlines()) <= 3


VAE = {**original_files.VAE, "latent_channels": 16}
UNQUANTISED = {"use_quant_conv": False, "use_post_quant_conv": False}


def original_vae(config, class_name, names):
  """(tensors under diffusers' names, of the original file)."""
  module = torch_trees.randomize(getattr(diffusers, class_name)(**config))
  tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
  tensors.pop("bn.num_batches_tracked", None)
  file = original_files.to_original(tensors, names)
  return tensors, {name: torch.from_numpy(array) for name, array in file.items()}


def assert_converts(file, config, expected):
  found = oracle.convert_ldm_vae_checkpoint(file, config)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_autoencoder_of_sd3_and_flux1_has_the_old_names():
  config = {**VAE, **UNQUANTISED}
  tensors, file = original_vae(config, "AutoencoderKL", original.vae)
  assert len(file) == len(tensors) and "decoder.mid.attn_1.q.weight" in file
  assert_converts(file, config, tensors)


def test_concatenated_arrays_read_no_more_than_they_are_asked_for():
  whole, read = np.arange(28, dtype=np.float32).reshape(7, 4), []

  def array(start, stop):
    def part(index):
      read.append(index[0].stop - index[0].start)
      return whole[start:stop][index]

    return lazy.LazyArray((stop - start, 4), part, f"rows {start}")

  both = array(0, 3).concatenate(array(3, 7))
  np.testing.assert_array_equal(both, whole)
  for start in range(7):
    for stop in range(start, 8):
      read.clear()
      np.testing.assert_array_equal(both[start:stop, 1:3], whole[start:stop, 1:3])
      assert sum(read) == stop - start and 0 not in read
  np.testing.assert_array_equal(both.transpose((1, 0))[1:, 2:5], whole.T[1:, 2:5])
  with pytest.raises(ValueError, match=r"rows 3: expected \('any', 4\), found \(4, 2\)"):
    array(0, 3).concatenate(lazy.LazyArray((4, 2), whole.__getitem__, "rows 3"))
