"""DDPO the way ddpo-pytorch goes about it: diffusers' networks, peft's adapters, a Python loop.

The peer of the DDPO cases. Its weights are random, its arithmetic is the published one: DDIM with
eta 1, guidance in rollout and update, the clipped surrogate on mean log-probabilities, AdamW.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxalign.rewards import jpeg

LORA: dict[str, Any] = {
  "r": 4,
  "lora_alpha": 4,
  "init_lora_weights": "gaussian",
  "target_modules": ["to_k", "to_q", "to_v", "to_out.0"],
}
CLIP_RANGE, LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 3e-4, 1.0


class Loop:
  """One model and its optimizer; `epoch()` samples, scores and updates, and returns the reward.

  `reward` takes images `[B, 3, H, W]` in [0, 1] on the device; by default it is the JPEG size.
  """

  def __init__(
    self,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    device: str,
    dtype: Any,
    images: int,
    microbatch: int,
    steps: int,
    guidance: float,
    updates: int,
    compiled: bool,
    reward: Callable[[Any], Any] | None = None,
  ):
    import peft
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    self._device, self._dtype = device, dtype
    self._images, self._microbatch, self._steps = images, microbatch, steps
    self._guidance, self._updates = guidance, updates
    self._reward = reward or _jpeg
    torch.manual_seed(0)
    with torch.device(device):
      unet = UNet2DConditionModel.from_config(dict(configs["unet"]))
      self._vae = AutoencoderKL.from_config(dict(configs["vae"]))
      self._text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    for network in (unet, self._vae, self._text):
      network.to(dtype).requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(**LORA))
    self._trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in self._trained:
      parameter.data = parameter.data.float()  # masters in float32, as the reference keeps them
    self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE)
    self._unet = torch.compile(unet) if compiled else unet
    self._channels = configs["unet"]["in_channels"]
    self._size = configs["unet"]["sample_size"]
    self._length = configs["text_encoder"]["max_position_embeddings"]
    self._scaling = configs["vae"]["scaling_factor"]
    self._levels()

  def _levels(self) -> None:
    """The steps' timesteps and cumulative alphas, of the scaled-linear schedule of 1000 levels."""
    import torch

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1.0 - betas)
    stride = 1000 // self._steps
    times = np.arange(self._steps)[::-1] * stride + 1
    before = [alphas[max(0, time - stride)] for time in times]
    self._times = torch.tensor(times.copy(), device=self._device)
    self._alpha_t = torch.tensor(alphas[times], device=self._device, dtype=torch.float32)
    self._alpha_s = torch.tensor(np.array(before), device=self._device, dtype=torch.float32)

  def epoch(self) -> float:
    import torch

    parts = [self._sample() for _ in range(self._images // self._microbatch)]
    x, log_prob, text, rewards = (torch.cat(values, dim=0) for values in zip(*parts, strict=True))
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).clamp(-5.0, 5.0)
    order = torch.randperm(self._images, device=self._device)
    for rows in order.chunk(self._updates):
      self._update(x[rows], log_prob[rows], text[rows], advantages[rows])
    return float(rewards.mean())

  def _sample(self) -> tuple[Any, ...]:
    """`(x [m, S + 1, C, h, w], log_prob [m, S], text [m, N, D], rewards [m])` of a microbatch."""
    import torch

    m = self._microbatch
    with torch.no_grad():
      ids = torch.randint(0, 500, (m, self._length), device=self._device)
      text = self._text(ids).last_hidden_state
      shape = (m, self._channels, self._size, self._size)
      x = [torch.randn(shape, device=self._device)]
      log_probs = []
      for i in range(self._steps):
        at = torch.full((m,), i, device=self._device)
        with self._autocast():
          mean, std = self._distribution(x[-1], at, text)
        x.append(mean + std * torch.randn_like(mean))
        log_probs.append(_log_prob(x[-1], mean, std))
      images = self._vae.decode((x[-1] / self._scaling).to(self._dtype)).sample
      rewards = self._reward((images.float() / 2 + 0.5).clamp(0.0, 1.0)).to(self._device)
    return torch.stack(x, dim=1), torch.stack(log_probs, dim=1), text, rewards

  def _update(self, x: Any, old_log_prob: Any, text: Any, advantages: Any) -> None:
    import torch

    self._optimizer.zero_grad(set_to_none=True)
    slices = range(0, len(x), self._microbatch)
    count = len(slices) * self._steps
    for start in slices:
      rows = slice(start, start + self._microbatch)
      m = len(x[rows])
      for i in torch.randperm(self._steps).tolist():
        at = torch.full((m,), i, device=self._device)
        with self._autocast():
          mean, std = self._distribution(x[rows, i], at, text[rows])
        log_prob = _log_prob(x[rows, i + 1], mean, std)
        ratio = torch.exp(log_prob - old_log_prob[rows, i])
        clipped = ratio.clamp(1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
        advantage = advantages[rows]
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        (loss / count).backward()
    torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
    self._optimizer.step()

  def _distribution(self, x: Any, at: Any, text: Any) -> tuple[Any, Any]:
    """Mean and std of the DDIM step with eta 1, guided, in float32."""
    import torch

    both = torch.cat([torch.zeros_like(text), text])
    twice = torch.cat([x, x]).to(self._dtype)
    times = self._times[at]
    eps = self._unet(twice, torch.cat([times, times]), both).sample.float()
    without, with_text = eps.chunk(2)
    eps = without + self._guidance * (with_text - without)
    alpha_t, alpha_s = (a[at].view(-1, 1, 1, 1) for a in (self._alpha_t, self._alpha_s))
    x_0 = (x - (1.0 - alpha_t).sqrt() * eps) / alpha_t.sqrt()
    variance = (1.0 - alpha_s) / (1.0 - alpha_t) * (1.0 - alpha_t / alpha_s)
    mean = alpha_s.sqrt() * x_0 + (1.0 - alpha_s - variance).clamp(min=0.0).sqrt() * eps
    return mean, variance.clamp(min=1e-12).sqrt()

  def _autocast(self) -> Any:
    import torch

    return torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32)


def _log_prob(x: Any, mean: Any, std: Any) -> Any:  # -> [B]
  value = -((x.detach() - mean) ** 2) / (2.0 * std**2) - std.log() - 0.5 * math.log(2.0 * math.pi)
  return value.mean(dim=(1, 2, 3))


def _jpeg(images: Any) -> Any:
  import torch

  pixels = images.permute(0, 2, 3, 1).cpu().numpy()
  return torch.from_numpy(jpeg.make_compressibility()(pixels, [{"prompt": ""}] * len(pixels)))
