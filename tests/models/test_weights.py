"""Names, layouts and every way in which a weight file can be wrong."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxalign import files
from jaxalign.models.weights import lazy, names, safetensors_io, tensor_files

FILE = "diffusion_pytorch_model.safetensors"

NAMES = {
  ("down_blocks_0", "resnets_1", "conv1", "kernel"): "down_blocks.0.resnets.1.conv1.weight",
  ("time_embedding", "linear_1", "kernel"): "time_embedding.linear_1.weight",
  ("mid_block", "attentions_0", "to_out_0", "bias"): "mid_block.attentions.0.to_out.0.bias",
  ("up_blocks_3", "attentions_0", "transformer_blocks_12", "ff", "net_2", "kernel"): (
    "up_blocks.3.attentions.0.transformer_blocks.12.ff.net.2.weight"
  ),
  ("encoder", "layers_10", "layer_norm1", "scale"): "encoder.layers.10.layer_norm1.weight",
  ("embeddings", "token_embedding", "embedding"): "embeddings.token_embedding.weight",
  ("up_blocks_0", "upsamplers_0", "conv", "bias"): "up_blocks.0.upsamplers.0.conv.bias",
  ("vision_model", "embeddings", "class_embedding"): "vision_model.embeddings.class_embedding",
}


def make_tree():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    "conv_in": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)},
    "down_blocks_0": {
      "resnets_0": {
        "conv_shortcut": {"kernel": draw(1, 1, 4, 5)},
        "norm1": {"scale": draw(4), "bias": draw(4)},
      },
      "attentions_0": {"to_q": {"kernel": draw(4, 6)}},
    },
    "token_embedding": {"embedding": draw(7, 3)},
  }


def stored(folder):
  return safetensors.numpy.load_file(folder / FILE)


def store(folder, tensors, name=FILE):
  safetensors.numpy.save_file(
    {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name
  )


@pytest.fixture
def folder(tmp_path):
  safetensors_io.write_component(tmp_path, make_tree(), {"sample_size": 8})
  return tmp_path


@pytest.mark.parametrize("path", NAMES)
def test_torch_name(path):
  assert names.torch_name(path) == NAMES[path]


def test_layout_by_hand():
  linear = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)  # [in=2, out=3]
  np.testing.assert_array_equal(names.to_torch(("kernel",), linear), linear.T)
  conv = np.zeros((3, 5, 2, 4), np.float32)  # [kh, kw, in, out]
  conv[0, 4, 1, 3] = 7.0
  assert names.to_torch(("kernel",), conv)[3, 1, 0, 4] == 7.0
  assert names.torch_shape(("kernel",), conv.shape) == (4, 2, 3, 5)
  assert names.torch_shape(("embedding",), (7, 3)) == (7, 3)


def test_a_one_by_one_convolution_stays_a_convolution(folder):
  assert stored(folder)["down_blocks.0.resnets.0.conv_shortcut.weight"].shape == (5, 4, 1, 1)
  assert stored(folder)["down_blocks.0.attentions.0.to_q.weight"].shape == (6, 4)


def test_round_trip_is_bit_exact(folder):
  tree = make_tree()
  tree["conv_in"]["bias"][:] = [np.float32(1e-42), -0.0, 3e38, np.pi]  # 1e-42 is subnormal
  safetensors_io.write_component(folder, tree, {})
  again = safetensors_io.read_component(folder, tree)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_config_is_written_verbatim_and_nothing_else_is_left(folder):
  assert json.loads((folder / "config.json").read_text()) == {"sample_size": 8}
  assert {file.name for file in folder.iterdir()} == {"config.json", FILE}
  with safetensors.safe_open(folder / FILE, framework="numpy") as opened:
    assert opened.metadata() == {"format": "pt"}


def test_weights_have_the_permissions_of_any_other_file(folder, tmp_path):
  plain = tmp_path / "plain"
  plain.touch()
  assert (folder / FILE).stat().st_mode == plain.stat().st_mode


def test_jax_arrays_are_written_and_shapes_suffice_to_read(folder):
  tree = jax.tree.map(jax.numpy.asarray, make_tree())
  safetensors_io.write_component(folder, tree, {})
  again = safetensors_io.read_component(folder, jax.eval_shape(lambda: tree))
  jax.tree.map(np.testing.assert_array_equal, again, make_tree())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(folder, dtype):
  halves = {name: array.astype(dtype) for name, array in stored(folder).items()}
  (folder / FILE).unlink()
  store(folder, halves, "model.fp16.safetensors")
  again = safetensors_io.read_component(folder, make_tree())
  expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), make_tree())
  jax.tree.map(np.testing.assert_array_equal, again, expected)
  assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}


def test_full_precision_is_preferred(folder):
  store(folder, {"wrong": np.zeros(1)}, "diffusion_pytorch_model.fp16.safetensors")
  assert tensor_files.find_weights(folder).name == FILE


def test_half_precision_and_shards_are_opened_like_one_file(folder):
  tensors = stored(folder)
  (folder / FILE).unlink()
  shards = write_shards(folder, tensors, variant=".fp16")
  assert tensor_files.find_weights(folder).name.endswith(".safetensors.index.fp16.json")
  again = safetensors_io.read_component(folder, make_tree())
  jax.tree.map(np.testing.assert_array_equal, again, make_tree())
  assert len(shards) == 2
  store(folder, tensors, "model.safetensors")  # full precision is preferred again
  assert tensor_files.find_weights(folder).name == "model.safetensors"


def write_shards(folder, tensors, variant=""):
  """Two files and their index, as diffusers and transformers name them."""
  stem = f"diffusion_pytorch_model{variant}"
  shards = [f"{stem}-{number:05}-of-00002.safetensors" for number in (1, 2)]
  weight_map = {name: shards[i % 2] for i, name in enumerate(sorted(tensors))}
  for shard in shards:
    store(folder, {n: x for n, x in tensors.items() if weight_map[n] == shard}, shard)
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  file = f"diffusion_pytorch_model.safetensors.index{variant}.json"
  (folder / file).write_text(json.dumps(index))
  return shards


def test_what_an_index_lists_must_be_there(folder):
  tensors = stored(folder)
  (folder / FILE).unlink()
  shards = write_shards(folder, tensors)
  content = (folder / shards[1]).read_bytes()
  (folder / shards[1]).unlink()
  with pytest.raises(ValueError, match=rf"index.json lists {shards[1]} for 3 tensors, found no"):
    safetensors_io.read_component(folder, make_tree())
  (folder / shards[1]).write_bytes(content[:-4])
  with pytest.raises(ValueError, match=rf"{shards[1]} is cut short"):
    safetensors_io.read_component(folder, make_tree())
  (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
  with pytest.raises(ValueError, match=rf"expected \S+ in {shards[1]}, found none"):
    safetensors_io.read_component(folder, make_tree())
  for content in ("{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: expected a 'weight_map'"):
      safetensors_io.read_component(folder, make_tree())


def test_opened_weights_read_the_part_that_is_asked_for(folder, monkeypatch):
  opened = safetensors_io.open_component(folder, make_tree())
  expected = make_tree()
  read = []
  plain = tensor_files._read
  monkeypatch.setattr(tensor_files, "_read", lambda *a: read.append(a[2:]) or plain(*a))
  kernel, whole = opened["conv_in"]["kernel"], expected["conv_in"]["kernel"]
  assert (kernel.shape, kernel.ndim, kernel.dtype) == ((3, 3, 2, 4), 4, np.float32)
  assert read == []  # nothing but headers so far
  index = (slice(1, 3), slice(None), slice(0, 1), slice(2, 4, 1))
  np.testing.assert_array_equal(kernel[index], whole[index])
  # [k, k, in, out] here is [out, in, k, k] there.
  sought = (slice(2, 4), slice(0, 1), slice(1, 3), slice(0, 3))
  assert read == [("conv_in.weight", sought)]
  for index in (slice(1, 2), 2, (..., 1), (slice(None, None, 2),), (), (slice(2, 1),)):
    np.testing.assert_array_equal(kernel[index], whole[index])
  jax.tree.map(np.testing.assert_array_equal, opened, expected)
  assert np.asarray(kernel).flags.c_contiguous
  with pytest.raises(ValueError, match="without a copy"):
    np.array(kernel, copy=False)


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 3), (4, 3, 1), (4, 3, 1, 1)])
def test_lazy_views_are_those_of_numpy(shape):
  whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  array = lazy.LazyArray(shape, lambda index: whole[index])
  np.testing.assert_array_equal(array.rows(1, 3), whole[1:3])
  np.testing.assert_array_equal(array.rows(1, 3)[1:2], whole[2:3])
  axes = tuple(range(len(shape)))[::-1]
  np.testing.assert_array_equal(array.transpose(axes)[0:1], whole.transpose(axes)[0:1])
  other = (4, 1) if shape == (4, 1, 1) else (4, 3, 1, 1, 1)
  np.testing.assert_array_equal(array.reshape_units(other)[1:3], whole.reshape(other)[1:3])
  with pytest.raises(ValueError, match="but for trailing ones"):
    array.reshape_units((2, 2, *shape[1:]))


def test_a_file_that_changes_after_it_was_opened_is_an_error(folder):
  opened = safetensors_io.open_component(folder, make_tree())
  tree = jax.tree.map(lambda leaf: leaf + 1, make_tree())
  safetensors_io.write_component(folder, tree, {})
  with pytest.raises(ValueError, match=rf"{FILE} has changed since it was opened"):
    np.asarray(opened["conv_in"]["bias"])


def test_a_scalar_is_read_with_its_shape(tmp_path):
  safetensors_io.write_tensors(tmp_path / FILE, {"logit_scale": np.float32(2.5)})
  tree = safetensors_io.read_component(tmp_path, {"logit_scale": np.zeros(())})
  assert tree["logit_scale"].shape == () and tree["logit_scale"] == 2.5


def test_text_encoder_without_prefix_and_with_buffer(tmp_path):
  expected = {"text_model": {"final_layer_norm": {"scale": np.zeros(2), "bias": np.zeros(2)}}}
  for prefix in ("", "text_model."):
    store(
      tmp_path,
      {
        prefix + "final_layer_norm.weight": np.float32([1, 2]),
        prefix + "final_layer_norm.bias": np.float32([3, 4]),
        prefix + "embeddings.position_ids": np.arange(5)[None],
      },
    )
    tree = safetensors_io.read_component(tmp_path, expected)
    np.testing.assert_array_equal(tree["text_model"]["final_layer_norm"]["scale"], [1, 2])
    np.testing.assert_array_equal(tree["text_model"]["final_layer_norm"]["bias"], [3, 4])


def test_old_attention_names(tmp_path):
  old = ("query", "key", "value", "proj_attn")
  new = ("to_q", "to_k", "to_v", "to_out_0")
  layer = {name: {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)} for name in new}
  tensors = {}
  for i, name in enumerate(old):
    tensors[f"mid_block.attentions.0.{name}.weight"] = np.float32([[i, 10], [20, 30]])
    tensors[f"mid_block.attentions.0.{name}.bias"] = np.float32([i, -i])
  store(tmp_path, tensors)
  tree = safetensors_io.read_component(tmp_path, {"mid_block": {"attentions_0": layer}})
  for i, name in enumerate(new):
    found = tree["mid_block"]["attentions_0"][name]
    np.testing.assert_array_equal(found["kernel"], [[i, 20], [10, 30]])
    np.testing.assert_array_equal(found["bias"], [i, -i])


def test_all_misfits_are_listed_at_once(folder):
  tensors = stored(folder)
  del tensors["token_embedding.weight"], tensors["conv_in.bias"]
  tensors["conv_in.weight"] = tensors["conv_in.weight"].reshape(2, 4, 3, 3)
  for i in range(8):
    tensors[f"extra.{i}"] = np.zeros(1, np.float32)
  store(folder, tensors)
  with pytest.raises(ValueError) as caught:
    safetensors_io.read_component(folder, make_tree())
  message = str(caught.value)
  assert len(message.splitlines()) == 3
  assert FILE in message
  assert "2 missing: conv_in.bias, token_embedding.weight" in message
  assert "8 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4, and 3 more" in message
  assert "1 misshapen: conv_in.weight (2, 4, 3, 3) instead of (4, 2, 3, 3)" in message


def test_square_kernel_stored_as_convolution_is_misshapen(folder):
  tensors = stored(folder)
  name = "down_blocks.0.attentions.0.to_q.weight"
  tensors[name] = tensors[name][:, :, None, None]
  store(folder, tensors)
  with pytest.raises(ValueError, match=r"1 misshapen: .*to_q.weight \(6, 4, 1, 1\)"):
    safetensors_io.read_component(folder, make_tree())


def rename(tensors):
  tensors["conv_in.kernel"] = tensors.pop("conv_in.weight")


def reshape(tensors):
  tensors["conv_in.bias"] = tensors["conv_in.bias"].reshape(2, 2)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda tensors: tensors.pop("conv_in.bias"), "1 missing: conv_in.bias."),
    (rename, "1 missing: conv_in.weight; 1 unexpected: conv_in.kernel."),
    (reshape, r"1 misshapen: conv_in.bias \(2, 2\) instead of \(4,\)."),
  ],
  ids=["missing", "renamed", "reshaped"],
)
def test_a_single_tensor_that_does_not_fit_is_named(folder, change, words):
  tensors = stored(folder)
  change(tensors)
  (folder / FILE).unlink()
  write_shards(folder, tensors)
  with pytest.raises(ValueError, match=rf"index\.json does not fit its config.*\n{words}"):
    safetensors_io.read_component(folder, make_tree())


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_file(folder, keep):
  content = (folder / FILE).read_bytes()
  (folder / FILE).write_bytes(content[:keep])
  with pytest.raises(ValueError, match=rf"{FILE} is cut short .*download it again"):
    safetensors_io.read_component(folder, make_tree())


def test_pointer_instead_of_weights(folder):
  (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
  with pytest.raises(ValueError, match=rf"{FILE} .*no safetensors file .*download it again"):
    safetensors_io.read_component(folder, make_tree())


def test_missing_file_and_folder(tmp_path):
  with pytest.raises(ValueError, match=rf"expected {tmp_path / FILE} .*found neither"):
    safetensors_io.read_component(tmp_path, make_tree())
  with pytest.raises(ValueError, match=rf"expected {tmp_path / 'no' / FILE} .*no such folder"):
    safetensors_io.read_component(tmp_path / "no", make_tree())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickle_is_refused(tmp_path, name):
  (tmp_path / name).write_bytes(b"\x80\x04")
  with pytest.raises(ValueError, match=rf"(?s)only {name}, a pickle.*safe_serialization=True"):
    safetensors_io.read_component(tmp_path, make_tree())


def test_failed_write_leaves_the_old_file(folder, monkeypatch):
  before = (folder / FILE).read_bytes()

  def fail(tensors, filename, metadata):
    filename.write_bytes(b"half")
    raise OSError("no space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  with pytest.raises(OSError, match="no space"):
    safetensors_io.write_component(folder, {"norm": {"scale": np.ones(3)}}, {"changed": True})
  assert (folder / FILE).read_bytes() == before
  assert files.read_json(folder / "config.json") == {"sample_size": 8}
  assert {file.name for file in folder.iterdir()} == {"config.json", FILE}
