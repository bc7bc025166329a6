"""The CPU cases, PyTorch's side: diffusers' networks on our weights, eager or compiled."""

import os
import pathlib
from typing import Any

import numpy as np

from jaxalign.benchmarks import cpu, measure, models, torch_ddpo
from jaxalign.models.weights import safetensors_io


def load_unet(name: str, folder: str | os.PathLike) -> Any:
  """diffusers' UNet with the weights of `models.build(name)`, through a file in `folder`."""
  folder = pathlib.Path(folder)
  from diffusers import UNet2DConditionModel

  model = models.build(name)
  path = folder / "unet"
  if not path.exists():
    safetensors_io.write_component(path, model.params["unet"], model.configs["unet"])
  return UNet2DConditionModel.from_pretrained(path)


def _inputs(name: str) -> tuple[Any, Any, Any]:
  import torch

  x_t, t, text = cpu.inputs(models.build(name, random_params=False))
  x_t = np.ascontiguousarray(x_t.transpose(0, 3, 1, 2))
  return torch.from_numpy(x_t), torch.from_numpy(t), torch.from_numpy(text)


def unet_forward(name: str, folder: str | os.PathLike, *, compiled: bool) -> measure.Calls:
  """As `cpu.unet_forward`."""
  folder = pathlib.Path(folder)
  import torch

  unet = load_unet(name, folder).eval()
  x_t, t, text = _inputs(name)
  network = torch.compile(unet) if compiled else unet

  @torch.inference_mode()
  def forward() -> float:
    return _size(network(x_t, t, text).sample)

  @torch.inference_mode()
  def steps() -> float:
    x = x_t
    for _ in range(cpu.STEPS):
      x = x - 0.1 * network(x, t, text).sample
    return _size(x)

  return {"forward": forward, "4 steps": steps}


def unet_gradient(name: str, folder: str | os.PathLike, *, compiled: bool) -> measure.Calls:
  """As `cpu.unet_gradient`; the adapters are peft's."""
  folder = pathlib.Path(folder)
  import peft
  import torch

  x_t, t, text = _inputs(name)

  def gradient_of(unet):
    network = torch.compile(unet) if compiled else unet

    def gradient() -> float:
      unet.zero_grad(set_to_none=True)
      loss = network(x_t, t, text).sample.square().mean()
      loss.backward()
      return float(loss)

    return gradient

  adapted = load_unet(name, folder)
  adapted.requires_grad_(False)
  adapted.add_adapter(peft.LoraConfig(**torch_ddpo.LORA))
  return {"full": gradient_of(load_unet(name, folder)), "LoRA r4": gradient_of(adapted)}


def ddpo_epoch(name: str, folder: str | os.PathLike, *, compiled: bool) -> measure.Calls:
  """As `cpu.ddpo_epoch`, the way ddpo-pytorch goes about it."""
  folder = pathlib.Path(folder)
  import torch

  loop = torch_ddpo.Loop(
    models.CONFIGS[name],
    device="cpu",
    dtype=torch.float32,
    images=cpu.IMAGES,
    microbatch=cpu.MICROBATCH,
    steps=cpu.DDPO_STEPS,
    guidance=cpu.GUIDANCE,
    updates=1,
    compiled=compiled,
  )
  return {"epoch": loop.epoch}


def _size(x: Any) -> float:
  return float(x.square().mean().sqrt())


