"""The GPU cases, PyTorch's side: diffusers in bfloat16 with channels last, eager or compiled."""

import os
from typing import Any

from jaxalign.benchmarks import gpu, measure, models, torch_ddpo


def rollout(name: str, folder: str | os.PathLike, *, compiled: bool) -> measure.Calls:
  """As `gpu.rollout`, through diffusers' own DDIM scheduler."""
  del folder
  import torch
  from diffusers import AutoencoderKL, DDIMScheduler

  configs = models.CONFIGS[name]
  unet = _unet(configs, torch.bfloat16)
  with torch.device("cuda"):
    vae = AutoencoderKL.from_config(dict(configs["vae"])).to(torch.bfloat16)
  network = torch.compile(unet, mode="max-autotune", fullgraph=True) if compiled else unet
  scheduler = DDIMScheduler.from_config(models.SCHEDULER)
  size, width = configs["unet"]["sample_size"], configs["unet"]["cross_attention_dim"]

  @torch.inference_mode()
  def sample(batch: int) -> float:
    text = torch.randn(2 * batch, 77, width, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(batch, 4, size, size, device="cuda")
    scheduler.set_timesteps(gpu.ROLLOUT_STEPS, device="cuda")
    for t in scheduler.timesteps:
      twice = torch.cat([x, x]).to(torch.bfloat16, memory_format=torch.channels_last)
      without, with_text = network(twice, t, text).sample.float().chunk(2)
      eps = without + gpu.ROLLOUT_GUIDANCE * (with_text - without)
      x = scheduler.step(eps, t, x).prev_sample
    latents = (x / configs["vae"]["scaling_factor"]).to(torch.bfloat16)
    return float(vae.decode(latents).sample.float().mean())

  return {f"batch {batch}": gpu.bound(sample, batch) for batch in gpu.ROLLOUT_BATCHES}


def ddpo(name: str, folder: str | os.PathLike, *, compiled: bool) -> measure.Calls:
  """As `gpu.ddpo`, the way ddpo-pytorch goes about it."""
  del folder
  import torch
  from torch.nn import functional
  from transformers import CLIPVisionConfig, CLIPVisionModel

  with torch.device("cuda"):
    tower: Any = CLIPVisionModel(CLIPVisionConfig(**gpu.CLIP_L_VISION))
  tower.to(torch.bfloat16)

  def score(images: Any) -> Any:
    size = (224, 224)
    resized = functional.interpolate(images, size=size, mode="bicubic", antialias=True)
    return tower(resized.to(torch.bfloat16)).pooler_output.float().mean(dim=-1)

  loop = torch_ddpo.Loop(
    models.CONFIGS[name],
    device="cuda",
    dtype=torch.bfloat16,
    images=gpu.DDPO_IMAGES,
    microbatch=gpu.DDPO_MICROBATCH,
    steps=gpu.DDPO_STEPS,
    guidance=gpu.DDPO_GUIDANCE,
    updates=1,
    compiled=compiled,
    reward=score,
  )
  return {"epoch": loop.epoch}


def dpo(name: str, folder: str | os.PathLike, *, compiled: bool) -> measure.Calls:
  """As `gpu.dpo`, the way diffusers' own script goes about it."""
  del folder
  steps = _DPOSteps(models.CONFIGS[name], compiled)
  return {
    f"{label}, {count} pairs": gpu.bound(steps.run, label, count)
    for label in ("full", "LoRA r8")
    for count in gpu.DPO_BATCHES
  }


class _DPOSteps:
  """Updates of all weights, or of adapters, one of them in memory at a time."""

  def __init__(self, configs: Any, compiled: bool):
    self._configs, self._compiled = configs, compiled
    self._label: str | None = None
    self._unet: Any = None
    self._reference: Any = None
    self._optimizer: Any = None

  def run(self, label: str, count: int) -> float:
    import torch

    if label != self._label:
      self._unet = self._reference = self._optimizer = None
      torch.cuda.empty_cache()
      self._make(label)
      self._label = label
    return self._step(count)

  def _make(self, label: str) -> None:
    import peft
    import torch

    unet = _unet(self._configs, torch.float32)
    unet.enable_gradient_checkpointing()
    if label == "full":
      self._reference = _unet(self._configs, torch.bfloat16).requires_grad_(False)
    else:
      unet.requires_grad_(False)
      unet.add_adapter(peft.LoraConfig(**{**torch_ddpo.LORA, "r": 8, "lora_alpha": 8}))
    self._raw = unet.train()
    self._unet = torch.compile(unet) if self._compiled else unet
    trained = [p for p in unet.parameters() if p.requires_grad]
    self._optimizer = torch.optim.AdamW(trained, lr=1e-5)

  def _step(self, count: int) -> float:
    import torch
    from torch.nn import functional

    x_t = torch.randn(2 * count, 4, 128, 128, device="cuda")
    target = torch.randn_like(x_t)
    t = torch.randint(0, 1000, (count,), device="cuda").repeat(2)
    text = torch.randn(2 * count, 77, 2048, device="cuda")
    pooled = torch.randn(2 * count, 1280, device="cuda")
    sizes = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024], device="cuda").repeat(2 * count, 1)
    added = {"text_embeds": pooled, "time_ids": sizes}

    def error(network: Any) -> Any:
      prediction = network(x_t, t, text, added_cond_kwargs=added).sample.float()
      return (prediction - target).square().mean(dim=(1, 2, 3)).chunk(2)

    with torch.autocast("cuda", torch.bfloat16):
      won, lost = error(self._unet)
      with torch.no_grad():
        if self._reference is None:
          self._raw.disable_adapters()
          reference_won, reference_lost = error(self._raw)
          self._raw.enable_adapters()
        else:
          reference_won, reference_lost = error(self._reference)
    inside = -0.5 * 5000.0 * ((won - lost) - (reference_won - reference_lost))
    loss = -functional.logsigmoid(inside).mean()
    loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return float(loss)


def _unet(configs: Any, dtype: Any) -> Any:
  import torch
  from diffusers import UNet2DConditionModel

  with torch.device("cuda"):
    unet = UNet2DConditionModel.from_config(dict(configs["unet"]))
  return unet.to(dtype, memory_format=torch.channels_last)
