"""A model made ready to sample: network, policy, process and guidance in one jitted program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.diffusion import guidance as guidance_lib
from jaxalign.diffusion import rollout as rollout_lib
from jaxalign.diffusion import transitions
from jaxalign.models import policy as policy_lib
from jaxalign.models import stable_diffusion
from jaxalign.types import Array, DenoiseFn, Key, Params

# The section `lora` of a model that is sampled as it is.
NO_LORA = {"rank": 0, "alpha": 1.0, "targets": ""}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
  """A microbatch of finished rollouts."""

  rollout: rollout_lib.Rollout
  cond: guidance_lib.Guided  # leaves [m, N, D] and [1, N, D]: what the policy saw
  images: Array  # [m, H, W, 3] in [0, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class System:
  """What `train`, `sample` and `evaluate` share, so that all of them sample alike.

  Attributes:
    model: networks, tokenizer and configs.
    process: step table and transition.
    denoise_fn: the guided denoiser; its `cond` is a `Guided`.
    policy: the trained parameters as initialised, and how they enter the network.
    frozen: `{"base", "text_encoder", "vae"}`, an argument of every program.
    sample: pure `(params, frozen, token_ids [m, N], x_T [m, h, w, C], key) -> Sampled`.
    sample_fn: jitted `(params, frozen, token_ids [m, N], seed, i, j) -> Sampled`; all noise is a
      function of the three integers.
  """

  model: stable_diffusion.StableDiffusion
  process: transitions.Process
  denoise_fn: DenoiseFn
  policy: policy_lib.Policy
  frozen: Mapping[str, Params]
  sample: Callable[[Params, Mapping[str, Params], Array, Array, Key], Sampled]
  sample_fn: Callable[[Params, Mapping[str, Params], Array, int, int, int], Sampled]

  def sample_images(
    self, params: Params, token_ids: np.ndarray, *, microbatch: int, seed: int
  ) -> np.ndarray:
    """Images `[M, H, W, 3]` of any number of prompts; noise from `seed` and the microbatch's size.

    The last microbatch is padded, so that no second program is compiled.
    """
    if microbatch < 1 or len(token_ids) < 1:
      raise ValueError(
        f"expected at least one image in microbatches of at least 1, got {len(token_ids)} images "
        f"in microbatches of {microbatch}"
      )
    padding = -len(token_ids) % microbatch
    padded = np.concatenate([token_ids, np.repeat(token_ids[-1:], padding, axis=0)])
    images = [
      np.asarray(self.sample_fn(params, self.frozen, rows, seed, 0, j).images)
      for j, rows in enumerate(np.split(padded, len(padded) // microbatch))
    ]
    return np.concatenate(images)[: len(token_ids)]


def make_system(
  *,
  seed: int,
  model: Mapping[str, Any],
  lora: Mapping[str, Any],
  process: Mapping[str, Any],
  guidance: Mapping[str, Any],
) -> System:
  """Builds the system from the sections of a config that have these names."""
  sections = {"model": model, "lora": lora, "process": process, "guidance": guidance}
  section = functools.partial(checks.call_section, sections)
  loaded = section("model", stable_diffusion.load)
  policy = section(
    "lora",
    policy_lib.make_policy,
    unet_params=loaded.params["unet"],
    key=jax.random.key(seed),
  )
  solved_process = section(
    "process", transitions.make_process, scheduler_config=loaded.scheduler_config
  )
  denoise_fn = section("guidance", guidance_lib.classifier_free, denoise_fn=loaded.denoise)
  frozen = {
    "base": policy.base,
    "text_encoder": loaded.params["text_encoder"],
    "vae": loaded.params["vae"],
  }
  sample = make_sample(loaded, solved_process, denoise_fn, policy.variables)

  def sample_fn(params, frozen, token_ids, seed, i, j):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), j)
    key_start, key_steps = jax.random.split(key)
    x_T = jax.random.normal(key_start, (len(token_ids), *loaded.latent_shape))
    return sample(params, frozen, token_ids, x_T, key_steps)

  return System(
    model=loaded,
    process=solved_process,
    denoise_fn=denoise_fn,
    policy=policy,
    frozen=jax.device_put(frozen),
    sample=sample,
    sample_fn=jax.jit(sample_fn),
  )


def from_config(config: Mapping[str, Any]) -> System:
  """The system of a run's whole config."""
  names = ("model", "lora", "process", "guidance")
  return make_system(seed=config["seed"], **{name: config[name] for name in names})


def make_sample(
  model: stable_diffusion.StableDiffusion,
  process: transitions.Process,
  denoise_fn: DenoiseFn,
  variables_fn: Callable[[Params, Params], Params],
) -> Callable[[Params, Mapping[str, Params], Array, Array, Key], Sampled]:
  """The pure function from prompts and initial noise to images and their whole trajectory."""
  empty_ids = model.tokenize([""])

  def sample(params, frozen, token_ids, x_T, key):
    text = model.encode_text(frozen["text_encoder"], jnp.concatenate([token_ids, empty_ids]))
    cond = guidance_lib.Guided({"text": text[:-1]}, {"text": text[-1:]})
    rolled = rollout_lib.rollout(
      key,
      variables_fn(params, frozen["base"]),
      denoise_fn,
      process,
      x_T,
      cond,
      rollout_lib.mean_over_latents,
    )
    return Sampled(rolled, cond, model.decode(frozen["vae"], rolled.x_0))

  return sample
