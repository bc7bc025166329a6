"""Flow transformers through training and back out: a run of each feed, adapters, and diffusers."""

import jax
import numpy as np
import pytest
import small_flows
from device_jobs import without_the_last_iteration

from jaxalign import export, system, train
from jaxalign.cli import command, source
from jaxalign.models import families
from jaxalign.models.families import flux2
from jaxalign.training import checkpoint, metrics

PROMPTS = ["a cat", "dog a"]
LENGTH, NUM_STEPS, SCALE, SIZE = 20, 3, 2.5, (16, 16)
# The layers that peers train: projections of both streams, feed-forward networks, fused layers.
ATTENTION = r"attn\d?/(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)$"
TARGETS = {
  "sd3": rf"{ATTENTION}|ff(_context)?/net_[02]",
  "flux1": rf"{ATTENTION}|ff(_context)?/net_[02]|single_.*/(proj_mlp|proj_out)$",
  "flux2": rf"{ATTENTION}|ff(_context)?/linear_(in|out)$|attn/(to_qkv_mlp_proj|to_out)$",
  "z_image": r"layers_.*/(to_[qkv]|to_out_0)$|feed_forward/w[123]$",
  "qwen_image": rf"{ATTENTION}|(img|txt)_mlp/net_[02]",
}
PEFT_TARGETS = {
  "sd3": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "net.2"],
  "flux1": ["to_q", "to_k", "to_out.0", "add_v_proj", "net.0.proj", "proj_mlp"],
  "flux2": ["to_q", "add_k_proj", "to_add_out", "linear_in", "linear_out", "to_qkv_mlp_proj"],
  "z_image": ["to_q", "to_v", "to_out.0", "w1", "w2"],
  "qwen_image": ["to_q", "add_k_proj", "to_add_out", "img_mlp.net.2", "txt_mlp.net.0.proj"],
}
DEPTHS = (1, 2, 3)  # of the hidden states that FLUX.2 reads, in the place of 9, 18 and 27
# The scale of guidance under its name in diffusers' pipeline.
SCALES = {"qwen_image": "true_cfg_scale"}


@pytest.fixture(scope="module", params=TARGETS)
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
  encoder = {"text_encoder": {"num_hidden_layers": 4}} if kind == "flux2" else {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(flux2._DEPTHS, "qwen3", DEPTHS)
    yield small_flows.write(kind, tmp_path_factory.mktemp(kind) / "model", **encoder)


@pytest.fixture(scope="module")
def noise(folder):
  model = families.open_model(folder, text_length=LENGTH, image_size=SIZE)
  return np.random.default_rng(0).standard_normal((2, *model.latent_shape), np.float32)


@pytest.fixture(scope="module")
def make_config(folder, kind, load_config, pairs_file):
  def make(name):
    config = load_config(name, "quicktest")
    config.model.update({"path": str(folder), "text_length": LENGTH, "image_size": SIZE})
    config.lora.update({"rank": 4, "alpha": 6.0, "targets": TARGETS[kind]})
    config.process = {"num_steps": NUM_STEPS, "transition": "flow_sde", "noise_level": 0.7}
    config.guidance.scale = SCALE
    config.optim.update({"learning_rate": 0.03, "warmup_steps": 0})
    config.evaluation.rewards = ("jpeg_compressibility",)
    config.guard.gold = ""
    config.checkpoint.every = 1
    if name == "ddpo":
      config.reward.names = ("jpeg_compressibility",)
    else:
      config.data.update({"source": str(pairs_file), "max_bad_fraction": 0.2, "resize": "crop"})
    return config

  return make


@pytest.fixture(scope="module", params=["ddpo", pytest.param("dpo", marks=pytest.mark.slow)])
def method(request):
  return request.param


@pytest.fixture(scope="module")
def trained(method, make_config, tmp_path_factory):
  """The workdir of two iterations on adapters, with steps that show."""
  workdir = tmp_path_factory.mktemp("run")
  train.train(make_config(method), workdir)
  return workdir


def load_pipeline(folder):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def images_of_diffusers(pipeline, kind, noise):
  own = {"max_sequence_length": LENGTH}
  if kind == "qwen_image":
    own = {"negative_prompt": [" "] * len(PROMPTS)}
  elif kind == "flux2":
    own["text_encoder_out_layers"] = DEPTHS
  return pipeline(
    prompt=list(PROMPTS),
    latents=small_flows.latents_for_diffusers(kind, noise),
    num_inference_steps=NUM_STEPS,
    height=SIZE[0],
    width=SIZE[1],
    output_type="np",
    **{SCALES.get(kind, "guidance_scale"): SCALE},
    **own,
  ).images


def images_of_run(workdir, noise):
  values = command.parse(export.define_flags, f"--workdir={workdir}")
  process = {"num_steps": NUM_STEPS, "noise_level": 0.0}
  found = source.load_run(values, process=process, guidance={"scale": SCALE})
  return images_of(found.system, found.params, noise)


def images_of(sys, params, noise):
  tokens = sys.model.tokenize([{"prompt": prompt} for prompt in PROMPTS])
  arguments = (tokens, noise, jax.random.key(0), sys.pipeline.table)
  return np.asarray(jax.jit(sys.sample)(params, sys.frozen, *arguments).samples)


def exported(workdir, output, form):
  values = (f"--workdir={workdir}", f"--format={form}", f"--output={output}")
  export.main(command.parse(export.define_flags, *values))
  return output


def test_what_was_trained_makes_the_same_images_in_diffusers(
  trained, folder, kind, noise, tmp_path
):
  """As an adapter beside the base model, and as a folder of its own."""
  pytest.importorskip("peft")
  records = [record for record in metrics.read(trained) if "loss/total" in record]
  assert len(records) == 2 and all(record["grad/norm"] > 0.0 for record in records)
  assert all(record.get("policy/first_ratio_max_error", 0.0) == 0.0 for record in records)
  ours = images_of_run(trained, noise)
  pipeline = load_pipeline(folder)
  base = images_of_diffusers(pipeline, kind, noise)
  pipeline.load_lora_weights(exported(trained, tmp_path / "adapter", "lora"))
  adapted = images_of_diffusers(pipeline, kind, noise)
  whole = exported(trained, tmp_path / "whole", "diffusers")
  merged = images_of_diffusers(load_pipeline(whole), kind, noise)
  assert np.abs(ours - base).max() > 0.02  # the training has done something
  np.testing.assert_allclose(ours, adapted, atol=2e-3)
  np.testing.assert_allclose(ours, merged, atol=2e-3)


def test_one_iteration_and_one_more_equal_two(trained, method, make_config, tmp_path):
  parts = without_the_last_iteration(trained, tmp_path / "parts")
  train.train(make_config(method), parts)
  whole, parts = (checkpoint.read_latest(folder) for folder in (trained, parts))
  jax.tree.map(np.testing.assert_array_equal, whole[1], parts[1])


def test_an_adapter_of_peft_is_read(folder, kind, noise, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  pipeline = load_pipeline(folder)
  modules = PEFT_TARGETS[kind]
  pipeline.transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=modules))
  torch.manual_seed(0)
  for name, weight in pipeline.transformer.named_parameters():
    if "lora_" in name:
      torch.nn.init.normal_(weight, std=0.2)
  state = peft.get_peft_model_state_dict(pipeline.transformer)
  pipeline.save_lora_weights(tmp_path, transformer_lora_layers=state)
  adapted = images_of_diffusers(pipeline, kind, noise)
  pipeline.transformer.disable_adapters()
  assert np.abs(adapted - images_of_diffusers(pipeline, kind, noise)).max() > 0.02
  model = families.open_model(folder, text_length=LENGTH, image_size=SIZE)
  values = command.parse(export.define_flags, f"--model={folder}", f"--lora={tmp_path}")
  process = {"num_steps": NUM_STEPS, "transition": "euler"}
  with pytest.MonkeyPatch.context() as patch:  # the command knows of no size and no length
    patch.setattr(families, "open_model", lambda path, **options: model)
    sys, params = source.load_model(values, process, {"scale": SCALE})
  np.testing.assert_allclose(images_of(sys, params, noise), adapted, atol=2e-3)
  flags = (f"--model={folder}", f"--lora={tmp_path}", f"--output={tmp_path / 'merged'}")
  export.main(command.parse(export.define_flags, *flags))
  merged = families.open_model(tmp_path / "merged", text_length=LENGTH, image_size=SIZE)
  sections = {"lora": system.NO_LORA, "process": process, "guidance": {"scale": SCALE}}
  sys = system.from_model(merged, seed=0, **sections)
  np.testing.assert_allclose(images_of(sys, sys.policy.params, noise), adapted, atol=2e-3)
