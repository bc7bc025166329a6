"""Weights and parts of flow transformers that are odd in one way: read, or refused; guidance."""

import re

import numpy as np
import odd_flows
import pytest

from jaxalign import files, system
from jaxalign.models import families

ONE = {
  ("flux1", "transformer"): "single_transformer_blocks.0.attn.norm_q.weight",
  ("flux1", "text_encoder"): "text_model.final_layer_norm.weight",
  ("flux1", "text_encoder_2"): "encoder.block.1.layer.1.DenseReluDense.wo.weight",
  ("flux2", "vae"): "bn.running_var",
  ("z_image", "transformer"): "cap_pad_token",
  ("z_image", "text_encoder"): "model.layers.1.self_attn.k_norm.weight",
  ("qwen_image", "vae"): "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
  ("qwen_image", "text_encoder"): "model.language_model.norm.weight",
}


@pytest.mark.parametrize(("kind", "component"), ONE)
def test_a_tensor_that_is_missing_or_renamed_is_named(copy_flow, kind, component):
  folder, name = copy_flow(kind), ONE[kind, component]
  original = odd_flows.tensors_of(folder, component)[1]
  assert name in original
  ours = re.sub(r"^model\.(language_model\.)?", "", name)
  odd_flows.rename(folder, component, lambda other: None if other == name else other)
  words = f"{component}.* does not fit its config.json.*1 missing: {re.escape(ours)}"
  odd_flows.check_refused(words, folder)
  file = odd_flows.tensors_of(folder, component)[0]
  odd_flows.store({(f"{k}_2" if k == name else k): v for k, v in original.items()}, file)
  odd_flows.check_refused(words, folder)


def test_a_step_count_of_any_type_is_left_alone(copy_flow, sound_flow):
  """PyTorch's batch norm stores it beside its statistics."""
  folder = copy_flow("flux2")
  file, tensors = odd_flows.tensors_of(folder, "vae")
  assert "bn.num_batches_tracked" in tensors
  for count in (np.array(7, np.int32), np.array([7.0], np.float16), np.array(True), None):
    kept = {k: v for k, v in tensors.items() if k != "bn.num_batches_tracked"}
    odd_flows.store(kept if count is None else {**kept, "bn.num_batches_tracked": count}, file)
    odd_flows.check_same(folder, sound_flow("flux2"))


KERNEL = "decoder.conv_in.weight"


@pytest.mark.parametrize(
  "shape", [(), (8,), (8, 3), (8, 3, 3), (8, 3, 0, 3, 3), (8, 3, 1, 3, 3, 3)], ids=str
)
def test_a_kernel_of_the_wrong_rank_is_refused(copy_flow, shape):
  folder = copy_flow("qwen_image")
  file, tensors = odd_flows.tensors_of(folder, "vae")
  odd_flows.store({**tensors, KERNEL: np.ones(shape, np.float32)}, file)
  message = odd_flows.refusal(lambda: odd_flows.read(odd_flows.open_model(folder)))
  assert str(folder) in message and KERNEL in message, message


def test_a_kernel_of_one_frame_is_read(copy_flow, sound_flow):
  folder = copy_flow("qwen_image")
  file, tensors = odd_flows.tensors_of(folder, "vae")
  expected = tensors[KERNEL][:, :, -1]
  odd_flows.store({**tensors, KERNEL: tensors[KERNEL][:, :, -1:].copy()}, file)
  found = odd_flows.read(odd_flows.open_model(folder))["vae"]["decoder"]["conv_in"]["kernel"]
  np.testing.assert_array_equal(found, expected.transpose(2, 3, 1, 0))
  odd_flows.check_same(folder, sound_flow("qwen_image"))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, bool])
@pytest.mark.parametrize(("kind", "component"), [("flux1", "transformer"), ("z_image", "vae")])
def test_weights_in_whole_numbers_are_refused(copy_flow, kind, component, dtype):
  """They are quantised, and nothing in the file says by what to multiply them."""
  folder = copy_flow(kind)
  file, tensors = odd_flows.tensors_of(folder, component)
  name = next(name for name in sorted(tensors) if tensors[name].ndim > 1)
  odd_flows.store({**tensors, name: tensors[name].astype(dtype)}, file)
  message = odd_flows.refusal(lambda: odd_flows.read(odd_flows.open_model(folder)))
  assert name in message, message


FOREIGN = {
  "WanPipeline": {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
  },
  "SanaPipeline": {
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
    "text_encoder": ["transformers", "Gemma2Model"],
  },
  "Krea2Pipeline": {"transformer": ["diffusers", "Krea2Transformer2DModel"]},
  "FluxKontextPipeline": {
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
  },
  "QwenImageEditPipeline": {
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "processor": ["transformers", "Qwen2VLProcessor"],
  },
  "PixArtSigmaPipeline": {"transformer": ["diffusers", "PixArtTransformer2DModel"]},
  "StableCascadeDecoderPipeline": {"decoder": ["diffusers", "StableCascadeUNet"]},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_family_that_is_not_offered_is_told_what_is(tmp_path, name):
  parts = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], **FOREIGN[name]}
  index = {"_class_name": name, "_diffusers_version": "0.36.0", **parts}
  files.write_json(tmp_path / "model_index.json", index)
  message = odd_flows.refusal(families.open_model, tmp_path)
  assert message.startswith(str(tmp_path / "model_index.json")) and name in message
  for offered in ("Stable Diffusion", "XL", "FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image"):
    assert offered in message, message


@pytest.mark.parametrize(
  ("kind", "changes", "words"),
  [
    ("flux1", {"_class_name": "Flux2Pipeline"}, "expected the parts of a FLUX.2, found one with"),
    ("z_image", {"_class_name": "FluxPipeline"}, "expected the parts of a FLUX.1, found one with"),
    ("flux1", {"text_encoder_2": [None, None]}, "found one without text_encoder_2"),
    ("z_image", {"tokenizer": ["transformers", "T5TokenizerFast"]}, "found 'T5TokenizerFast'"),
    ("z_image", {"controlnet": ["diffusers", "ZImageControlNetModel"]}, "one with controlnet"),
    ("flux2", {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "of a rectified flow"),
    ("qwen_image", {"vae": ["diffusers", "AutoencoderKLWan"]}, "found 'AutoencoderKLWan'"),
  ],
)
def test_an_index_of_other_parts_is_refused(copy_flow, kind, changes, words):
  folder = copy_flow(kind)
  odd_flows.change(folder / "model_index.json", **changes)
  odd_flows.check_refused(words, folder, shapes_only=True)


def guide(model, **guidance):
  process = {"num_steps": 2, "transition": "euler"}
  lora = system.NO_LORA
  return system.from_model(model, seed=0, lora=lora, process=process, guidance=guidance)


def test_klein_that_is_distilled_has_no_guidance(copy_flow):
  folder = copy_flow("flux2")
  odd_flows.change(folder / "model_index.json", is_distilled=True)
  model = odd_flows.open_model(folder)
  assert guide(model).guidance["scale"] == 1.0
  message = odd_flows.refusal(guide, model, scale=4.0)
  assert re.search(r"guidance\.scale: expected 1, .*got 4\.0", message), message


def test_flux1_dev_is_told_its_guidance(sound_flow):
  model = odd_flows.open_model(sound_flow("flux1"))
  assert guide(model).guidance == {"name": "embedded", "scale": 3.5}
  words = "expected the scale that this distilled network is told"
  assert words in odd_flows.refusal(guide, model, scale=1)


def test_flux1_schnell_has_no_guidance(copy_flow):
  folder = copy_flow("flux1")
  odd_flows.change(folder / "transformer" / "config.json", guidance_embeds=False)
  names = {name for name in odd_flows.tensors_of(folder, "transformer")[1] if "guidance_e" in name}
  odd_flows.rename(folder, "transformer", lambda name: None if name in names else name)
  model = odd_flows.open_model(folder)
  assert guide(model).guidance["scale"] == 1.0
  assert "guidance.scale: expected 1" in odd_flows.refusal(guide, model, scale=3.5)
