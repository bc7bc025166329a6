"""What single files say of themselves, in marker tensors and in their headers."""

import numpy as np
import pytest
import safetensors.numpy
import small_models

from jaxalign import files
from jaxalign.models import families
from jaxalign.models.families import stable_diffusion
from jaxalign.models.identity import folders, identity
from jaxalign.models.weights import published, single_file

ONE, NONE = np.zeros(1, np.float32), np.zeros(0, np.float32)
NAMES = {
  kind: [part.prefix + "x" for part in parts.values()] for kind, parts in single_file.KINDS.items()
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SPREAD = np.linspace(-1, 1, 320, dtype=np.float32)
ZERO_SNR = {"rescale_betas_zero_snr": True}
V, EPSILON = {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"}


def write(folder, kind, tensors, header):
  """A file with the names of a kind, a tensor each, and what is said of it."""
  file = folder / "model.safetensors"
  named = {**dict.fromkeys(NAMES[kind], ONE), **tensors}
  safetensors.numpy.save_file(named, file, metadata={"format": "pt", **header})
  return file


def spec(word, value):
  return {f"modelspec.{word}": value}


def lines(found):
  return "\n".join(identity.in_lines(found.notes))


@pytest.mark.parametrize(
  ("kind", "tensors", "header", "scheduler", "size", "words"),
  [
    # Nothing is said: what is assumed is.
    ("1.x", {}, {}, {}, 64, "prediction_type epsilon, of which the file says nothing"),
    ("2.x", {}, {}, V, 96, "prediction_type v_prediction, of which the file says nothing"),
    ("xl", {}, {}, EPSILON, 128, "prediction_type epsilon, of which the file says nothing"),
    # Tensors.
    ("xl", {"v_pred": NONE}, {}, V, 128, "v_prediction by tensor v_pred"),
    ("xl", {"v_pred": NONE, "ztsnr": NONE}, {}, V | ZERO_SNR, 128, "zero_snr true by tensor ztsnr"),
    ("xl", {"ztsnr": NONE}, {}, EPSILON, 128, "tensor ztsnr is left aside, which needs v_pred"),
    ("1.x", {"v_pred": NONE}, {}, V, 64, "v_prediction by tensor v_pred"),
    ("2.x", {NORM: SPREAD}, {}, V, 96, "v_prediction by the spread of its last norm"),
    ("2.x", {NORM: 0.1 * SPREAD}, {}, EPSILON, 64, "epsilon by the spread of its last norm"),
    # Words of the header (huggingface/diffusers#9171, Comfy-Org/ComfyUI PR#7840).
    ("1.x", {}, spec("prediction_type", "v"), V, 64, "v_prediction by modelspec.prediction_type"),
    ("1.x", {}, spec("prediction_type", "epsilon"), EPSILON, 64, "epsilon by modelspec"),
    ("2.x", {}, spec("prediction_type", "epsilon"), EPSILON, 64, "epsilon by modelspec"),
    ("xl", {}, spec("predict_key", "v"), V, 128, "v_prediction by modelspec.predict_key"),
    ("xl", {}, {"ss_v_parameterization": "True"}, V, 128, "v_prediction by ss_v_param"),
    (
      *("xl", {"v_pred": NONE}, {"ss_zero_terminal_snr": "True"}),
      *(V | ZERO_SNR, 128, "zero_snr true by ss_zero_terminal_snr"),
    ),
    ("2.x", {}, spec("architecture", "stable-diffusion-v2-512"), EPSILON, 64, "epsilon by models"),
    ("2.x", {}, spec("architecture", "stable-diffusion-v2-768-v"), V, 96, "v_prediction by models"),
    ("1.x", {}, spec("resolution", "768x512"), {}, [64, 96], "sample_size [64, 96] by modelspec"),
    ("1.x", {}, spec("resolution", "huge"), {}, 64, "prediction_type epsilon, of which"),
    # Words that contradict each other, or the tensors: the first is taken, the other is named.
    (
      *("xl", {"v_pred": NONE}, spec("prediction_type", "epsilon")),
      *(V, 128, "says prediction_type epsilon; v_prediction is taken, by tensor v_pred"),
    ),
    (
      *("xl", {}, spec("architecture", "stable-diffusion-v1/lora")),
      *(EPSILON, 128, "modelspec.architecture says stable-diffusion-v1, the tensors are those of"),
    ),
    ("xl", {}, spec("architecture", "x" * 3000), EPSILON, 128, "modelspec.architecture says xxx"),
  ],
)
def test_a_file_is_what_it_says(tmp_path, kind, tensors, header, scheduler, size, words):
  checkpoint = single_file.open_checkpoint(write(tmp_path, kind, tensors, header))
  assert checkpoint.kind == kind
  found = checkpoint.identify()
  said = published.CONFIGS[kind]
  assert found.configs["scheduler"] == {**said["scheduler"], **scheduler}
  assert found.configs["unet"] == {**said["unet"], "sample_size": size}
  assert "rescale_betas_zero_snr" not in published.CONFIGS[kind]["scheduler"]  # is left alone
  assert words in lines(found)
  assert len(lines(found)) < 600


@pytest.mark.parametrize(
  ("kind", "tensors", "header", "words"),
  [
    # huggingface/diffusers#7221: the picture is noise.
    ("xl", {"edm_mean": NONE, "edm_std": NONE}, {}, "found the tensor edm_mean.*Playground 2.5"),
    ("xl", {"edm_vpred.sigma_max": ONE}, {}, "edm_vpred.sigma_max.*noise levels of EDM"),
    ("1.x", {CONV_IN: np.zeros((8, 9, 1, 1), np.float32)}, {}, "found 9: .*an inpainting model"),
    ("2.x", {CONV_IN: np.zeros((8, 5, 1, 1), np.float32)}, {}, "found 5: .*depth-to-image"),
    ("1.x", {"model.diffusion_model.out.scale_weight": ONE}, {}, "scale or mark of quantised"),
    ("1.x", {}, spec("architecture", "stable-diffusion-v1-inpainting"), "model for inpainting is"),
    ("2.x", {}, spec("architecture", "stable-diffusion-v2-unclip-l"), "model for unclip is not"),
    ("xl", {}, spec("architecture", "stable-diffusion-xl-v1-edit"), "model for edit is not"),
  ],
)
def test_other_models_are_refused_by_name(tmp_path, kind, tensors, header, words):
  file = write(tmp_path, kind, tensors, header)
  with pytest.raises(ValueError, match=f"(?s){words}") as error:
    single_file.open_checkpoint(file)
  message = str(error.value)
  assert message.startswith(str(file))
  assert len(message.splitlines()) <= 3 and len(message) - len(str(file)) < 600


@pytest.mark.parametrize(
  ("tensor", "words"),
  [
    ("conditioner.embedders.0.model.ln_final.bias", "the refiner of Stable Diffusion XL"),
    ("model.diffusion_model.joint_blocks.0.x", "a part of a Stable Diffusion 3"),
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX of another kind"),
  ],
)
def test_other_kinds_are_refused_by_name(tmp_path, tensor, words):
  file = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({tensor: ONE, "first_stage_model.x": ONE}, file)
  with pytest.raises(ValueError, match=f"found {words}\nthis kind of model is not read"):
    single_file.open_checkpoint(file)


def test_a_word_that_is_not_known_asks(tmp_path):
  file = write(tmp_path, "xl", {}, spec("prediction_type", "flow" * 500))
  checkpoint = single_file.open_checkpoint(file)
  with pytest.raises(ValueError, match=r"prediction_type='flow.*\n.*--configs") as e:
    checkpoint.identify()
  assert len(str(e.value)) - len(str(file)) < 300
  named = identity.Identity({**published.CONFIGS["xl"]}, ())
  found = checkpoint.identify(named)
  assert found.configs == named.configs
  assert "modelspec.prediction_type='flow" in lines(found)


def test_named_configs_win_and_the_contradiction_is_said(tmp_path):
  """A model marked v_pred with --configs of one that predicts noise (invoke-ai/InvokeAI#7965)."""
  folder = tmp_path / "named"
  stable_diffusion.save(small_models.make("sd1", tmp_path), folder)
  file = write(tmp_path, "1.x", {"v_pred": NONE}, {})
  named = folders.read(folder)
  found = single_file.open_checkpoint(file).identify(named)
  assert found.configs == named.configs
  contradiction = "contradiction: tensor v_pred says prediction_type v_prediction; epsilon is taken"
  assert lines(found) == f"{contradiction}, as the named configs say"
  with pytest.raises(ValueError, match="does not fit"), pytest.warns(UserWarning, match="v_pred s"):
    families.open_model(file, configs=str(folder), tokenizer=str(folder))
  files.write_json(folder / folders.SCHEDULER, {**small_models.SCHEDULER, **V})
  assert single_file.open_checkpoint(file).identify(folders.read(folder)).notes == ()


@pytest.mark.parametrize("kind", ["1.x", "xl"])
def test_named_configs_of_another_kind_are_refused(tmp_path, kind):
  checkpoint = single_file.open_checkpoint(write(tmp_path, kind, {}, {}))
  other = {"1.x": "xl", "xl": "1.x"}[kind]
  with pytest.raises(ValueError, match=f"configs of a Stable Diffusion {kind}, found those of a"):
    checkpoint.identify(identity.Identity({**published.CONFIGS[other]}, ()))


@pytest.mark.parametrize("kind", ["1.x", "xl"])
def test_a_file_that_edits_images_says_so(tmp_path, kind):
  """As diffusers infers it: eight channels, the latents of the image among them."""
  file = write(tmp_path, kind, {CONV_IN: np.zeros((8, 8, 3, 3), np.float32)}, {})
  found = single_file.open_checkpoint(file).identify()
  assert found.configs["unet"]["in_channels"] == 8
  assert "InstructPix2Pix" in found.configs["pipeline"]["_class_name"]
  assert "in_channels 8 by its first convolution" in lines(found)
