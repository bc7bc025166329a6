"""Corrections of old configs: what diffusers' pipelines of 1.x and 2.x change when they load one.

Latents are not confined to [-1, 1], the first timestep of Stable Diffusion's grid is 1, and UNets
saved before diffusers 0.9 carry a sample size that was only a default.
"""

import re
from collections.abc import Callable
from typing import Any

from jaxalign.diffusion import schedulers
from jaxalign.models.identity.identity import Configs

_MIN_SAMPLE_SIZE = 64
_VERSION = re.compile(r"(\d+)\.(\d+)")


def correct(configs: Configs, corrections: tuple[str, ...]) -> Configs:
  """The configs with the named corrections, of those that `classes.PIPELINES` lists by class."""
  for name in corrections:
    component, correct_fn = _CORRECTIONS[name]
    configs = {**configs, component: correct_fn(configs[component])}
  return configs


def _steps_offset(scheduler: dict[str, Any]) -> dict[str, Any]:
  # A rectified flow has no such field; every other scheduler is sampled on DDIM's grid.
  return scheduler if schedulers.is_flow(scheduler) else {**scheduler, "steps_offset": 1}


def _clip_sample(scheduler: dict[str, Any]) -> dict[str, Any]:
  if schedulers.clips(scheduler) or scheduler.get("clip_sample"):
    return {**scheduler, "clip_sample": False}
  return scheduler


def _skip_prk_steps(scheduler: dict[str, Any]) -> dict[str, Any]:
  # PNDM alone has the field, and leaves the first steps in by default.
  has_field = scheduler.get("_class_name") == "PNDMScheduler" or "skip_prk_steps" in scheduler
  return {**scheduler, "skip_prk_steps": True} if has_field else scheduler


def _sample_size(unet: dict[str, Any]) -> dict[str, Any]:
  size = unet.get("sample_size")
  if _is_before_0_9(unet) and isinstance(size, int) and size < _MIN_SAMPLE_SIZE:
    return {**unet, "sample_size": _MIN_SAMPLE_SIZE}
  return unet


def _is_before_0_9(config: dict[str, Any]) -> bool:
  version = _VERSION.match(str(config.get("_diffusers_version", "")))
  return version is not None and (int(version[1]), int(version[2])) < (0, 9)


_CORRECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
  "steps_offset": ("scheduler", _steps_offset),
  "clip_sample": ("scheduler", _clip_sample),
  "skip_prk_steps": ("scheduler", _skip_prk_steps),
  "sample_size": ("unet", _sample_size),
}
