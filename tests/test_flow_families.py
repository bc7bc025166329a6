"""Flow transformers through training and back out: a run of each feed, adapters, and diffusers."""

import jax
import numpy as np
import pytest

from jaxalign import export, train
from jaxalign.cli import command, source
from jaxalign.models import families
from jaxalign.training import metrics

PROMPTS = ["a cat", "dog a"]
LENGTH, NUM_STEPS, SCALE = 8, 3, 2.5
# Both streams' projections and the feed-forward networks, as peers train them.
TARGETS = r"attn\d?/(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)$|ff(_context)?/net_[02]"


@pytest.fixture(scope="module")
def noise(small_sd3):
  model = families.open_model(small_sd3, text_length=LENGTH)
  return np.random.default_rng(0).standard_normal((2, *model.latent_shape), np.float32)


@pytest.fixture(scope="module")
def make_config(small_sd3, load_config, pairs_file):
  def make(name):
    config = load_config(name, "quicktest")
    config.model.update({"path": str(small_sd3), "text_length": LENGTH})
    config.lora.update({"rank": 4, "alpha": 6.0, "targets": TARGETS})
    config.process = {"num_steps": NUM_STEPS, "transition": "flow_sde", "noise_level": 0.7}
    config.guidance.scale = SCALE
    config.optim.update({"learning_rate": 0.03, "warmup_steps": 0})
    config.evaluation.rewards = ("jpeg_compressibility",)
    config.guard.gold = ""
    if name == "ddpo":
      config.reward.names = ("jpeg_compressibility",)
    else:
      config.data.update({"source": str(pairs_file), "max_bad_fraction": 0.2, "resize": "crop"})
    return config

  return make


@pytest.fixture(scope="module", params=["ddpo", "dpo"])
def trained(request, make_config, tmp_path_factory):
  """The workdir of two iterations on adapters, with steps that show."""
  workdir = tmp_path_factory.mktemp("run")
  train.train(make_config(request.param), workdir)
  return workdir


def load_pipeline(folder):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def images_of_diffusers(pipeline, noise):
  import torch

  return pipeline(
    PROMPTS,
    latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
    num_inference_steps=NUM_STEPS,
    guidance_scale=SCALE,
    max_sequence_length=LENGTH,
    height=16,
    width=16,
    output_type="np",
  ).images


def images_of_run(workdir, noise):
  values = command.parse(export.define_flags, f"--workdir={workdir}")
  process = {"num_steps": NUM_STEPS, "noise_level": 0.0}
  found = source.load_run(values, process=process, guidance={"scale": SCALE})
  sys = found.system
  tokens = sys.model.tokenize([{"prompt": prompt} for prompt in PROMPTS])
  arguments = (tokens, noise, jax.random.key(0), sys.pipeline.table)
  return np.asarray(jax.jit(sys.sample)(found.params, sys.frozen, *arguments).samples)


def exported(workdir, output, form):
  values = (f"--workdir={workdir}", f"--format={form}", f"--output={output}")
  export.main(command.parse(export.define_flags, *values))
  return output


def test_what_was_trained_makes_the_same_images_in_diffusers(trained, small_sd3, noise, tmp_path):
  """As an adapter beside the base model, and as a folder of its own."""
  pytest.importorskip("peft")
  records = [record for record in metrics.read(trained) if "loss/total" in record]
  assert len(records) == 2 and all(record["grad/norm"] > 0.0 for record in records)
  assert all(record.get("policy/first_ratio_max_error", 0.0) == 0.0 for record in records)
  ours = images_of_run(trained, noise)
  pipeline = load_pipeline(small_sd3)
  base = images_of_diffusers(pipeline, noise)
  pipeline.load_lora_weights(exported(trained, tmp_path / "adapter", "lora"))
  adapted = images_of_diffusers(pipeline, noise)
  whole = exported(trained, tmp_path / "whole", "diffusers")
  merged = images_of_diffusers(load_pipeline(whole), noise)
  assert np.abs(ours - base).max() > 0.02  # the training has done something
  np.testing.assert_allclose(ours, adapted, atol=2e-3)
  np.testing.assert_allclose(ours, merged, atol=2e-3)


def test_an_adapter_of_peft_is_read(small_sd3, noise, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  pipeline = load_pipeline(small_sd3)
  modules = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "net.2"]
  pipeline.transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=modules))
  torch.manual_seed(0)
  for name, weight in pipeline.transformer.named_parameters():
    if "lora_" in name:
      torch.nn.init.normal_(weight, std=0.2)
  state = peft.get_peft_model_state_dict(pipeline.transformer)
  pipeline.save_lora_weights(tmp_path, transformer_lora_layers=state)
  values = command.parse(export.define_flags, f"--model={small_sd3}", f"--lora={tmp_path}")
  sys, params = source.load_model(values, {"num_steps": 1, "transition": "euler"}, {"scale": 1.0})
  rng = np.random.default_rng(1)
  config = pipeline.transformer.config
  text = rng.standard_normal((2, 5, config.joint_attention_dim), np.float32)
  pooled = rng.standard_normal((2, config.pooled_projection_dim), np.float32)
  t = np.array([900.0, 30.0], np.float32)
  with torch.no_grad():
    arguments = [torch.from_numpy(x) for x in (text, pooled, t)]
    x_t = torch.from_numpy(noise).permute(0, 3, 1, 2)
    expected = pipeline.transformer(x_t, *arguments).sample.permute(0, 2, 3, 1)
    pipeline.transformer.disable_adapters()
    base = pipeline.transformer(x_t, *arguments).sample.permute(0, 2, 3, 1)
  cond = {"text": text, "pooled": pooled}
  variables = sys.policy.variables(params, sys.policy.base)
  actual = jax.jit(sys.model.denoise)(variables, noise, t, cond)
  scale = float(expected.abs().max())
  assert float((expected - base).abs().max()) > 0.05 * scale
  np.testing.assert_allclose(actual, expected, atol=1e-4 * scale)
  flags = (f"--model={small_sd3}", f"--lora={tmp_path}", f"--output={tmp_path / 'merged'}")
  export.main(command.parse(export.define_flags, *flags))
  merged = families.open_model(tmp_path / "merged", text_length=LENGTH).params["denoiser"]
  again = jax.jit(sys.model.denoise)({"params": jax.tree.map(np.asarray, merged)}, noise, t, cond)
  np.testing.assert_allclose(again, expected, atol=1e-4 * scale)
