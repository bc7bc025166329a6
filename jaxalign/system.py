"""A model made ready to sample: network, policy, process and guidance in one jitted program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, methods, streams
from jaxalign.diffusion import guidance as guidance_lib
from jaxalign.diffusion import log_ratios, schedulers, transitions
from jaxalign.diffusion import rollout as rollout_lib
from jaxalign.distributed import placement, sharding
from jaxalign.models.adapters import policy as policy_lib
from jaxalign.models.families import stable_diffusion
from jaxalign.rewards import combine
from jaxalign.types import Array, Key, Params

# The section `lora` of a model that is sampled as it is.
NO_LORA = {"rank": 0, "alpha": 1.0, "targets": ""}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
  """A microbatch of finished rollouts."""

  rollout: rollout_lib.Rollout
  cond: guidance_lib.Guided  # leaves [m, ...] and [1, ...]: what the policy saw
  images: jax.Array  # [m, H, W, 3] in [0, 1]


@dataclasses.dataclass(frozen=True, eq=False)
class System:
  """What `train`, `sample` and `evaluate` share, so that all of them sample alike.

  Attributes:
    mesh: the devices; batches are cut over them and parameters lie there by rule (`sharding`).
    model: networks, tokenizer and configs.
    parts: what methods compose; its `denoise_fn` is the guided network.
    policy: the trained parameters as initialised, and how they enter the network.
    frozen: `{"base", "reference", "vae"}` and the text encoders, an argument of every program.
    sample: pure `(params, frozen, token_ids [m, ...], x_T [m, h, w, C], key) -> Sampled`, token ids
      as from `model.tokenize`.
    sample_fn: jitted `(params, frozen, token_ids [m, ...], seed, name, i, j, start=None) ->
      Sampled`; all noise is `streams.stream(seed, name, i, j)`, whose name comes as its number.
      Image k starts from the noise `start[k]` of the m that are drawn, from its own without
      `start`.
    condition_fn: jitted `(frozen, token_ids [m, ...]) -> Guided`, what the policy sees of prompts.
    encode_fn: jitted `(frozen, images [m, ..., H, W, 3] in [0, 1] or uint8, seed, i, j) -> x_0`,
      with the leading axes of the images; a sample of the autoencoder's posterior, whose noise is a
      function of the three integers.
    kl_fn: jitted `(params, frozen, Sampled) -> [m]`, the KL to the reference of each trajectory, in
      nats, whole on every device.
  """

  mesh: jax.sharding.Mesh
  model: stable_diffusion.StableDiffusion
  parts: methods.Parts
  policy: policy_lib.Policy
  frozen: Mapping[str, Params]
  sample: Callable[[Params, Mapping[str, Params], Array, Array, Key], Sampled]
  sample_fn: Callable[..., Sampled]
  condition_fn: Callable[[Mapping[str, Params], Array], guidance_lib.Guided]
  encode_fn: Callable[[Mapping[str, Params], Array, int, int, int], Array]
  kl_fn: Callable[[Params, Mapping[str, Params], Sampled], Array]

  @property
  def process(self) -> transitions.Process:
    return self.parts.process

  def parts_with(self, rewards: combine.WeightedRewards | None) -> methods.Parts:
    """`parts`, with the rewards too if they run on the device; the loss finds their parameters in
    `frozen["reward"]`.
    """
    device = None if rewards is None else rewards.device
    if device is None:
      return self.parts
    return self.parts._replace(
      reward=lambda frozen, images, features: device.score(frozen["reward"], images, features)
    )

  def sample_images(
    self,
    params: Params,
    token_ids: np.ndarray,
    *,
    microbatch: int,
    seed: int,
    part: int = 0,
    kl: bool = False,
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Images `[M, H, W, 3]` of any number of prompts, and with `kl` the KL to the reference `[M]`.

    The KL costs the network twice over every trajectory, twice what sampling costs; where no step
    has noise it is None, and nothing is computed for it. The noise is that of evaluations, and
    comes from `seed`, `part` and the microbatch's size. The last microbatch is padded, so that no
    second program is compiled.
    """
    if microbatch < 1 or len(token_ids) < 1:
      raise ValueError(
        f"expected at least one image in microbatches of at least 1, got {len(token_ids)} images "
        f"in microbatches of {microbatch}"
      )
    padding = -len(token_ids) % microbatch
    padded = np.concatenate([token_ids, np.repeat(token_ids[-1:], padding, axis=0)])
    images, nats = [], []
    kl = kl and bool(self.process.noisy_steps())
    for j, rows in enumerate(np.split(padded, len(padded) // microbatch)):
      noise = (seed, streams.number("evaluation"), part, j, None)
      sampled = self.sample_fn(params, self.frozen, rows, *noise)
      images.append(sharding.gather(sampled.images))
      if kl:
        nats.append(np.asarray(self.kl_fn(params, self.frozen, sampled)))
    found = np.concatenate(nats)[: len(token_ids)] if kl else None
    return np.concatenate(images)[: len(token_ids)], found


def make_system(
  *,
  seed: int,
  model: Mapping[str, Any],
  lora: Mapping[str, Any],
  process: Mapping[str, Any],
  guidance: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None = None,
) -> System:
  """Builds the system from the sections of a config that have these names.

  On one device, unless there is a `mesh`. On one that is only described no weights are needed.
  """
  shapes_only = mesh is not None and sharding.is_described(mesh)
  loaded = checks.call_section(
    {"model": model}, "model", stable_diffusion.open_model, shapes_only=shapes_only
  )
  return from_model(loaded, seed=seed, lora=lora, process=process, guidance=guidance, mesh=mesh)


def from_model(
  loaded: stable_diffusion.StableDiffusion,
  *,
  seed: int,
  lora: Mapping[str, Any],
  process: Mapping[str, Any],
  guidance: Mapping[str, Any],
  mesh: jax.sharding.Mesh | None = None,
) -> System:
  """As `make_system`, of a model that is already in memory."""
  mesh = mesh or sharding.one_device()
  sections = {"lora": lora, "process": process, "guidance": guidance}
  section = functools.partial(checks.call_section, sections)
  policy = section(
    "lora",
    policy_lib.make_policy,
    unet_params=loaded.params["unet"],
    key=streams.stream(seed, "policy"),
    dtype=loaded.networks.dtype,
  )
  policy = place_policy(policy, loaded, mesh)
  parts = methods.Parts(
    process=section("process", transitions.make_process, scheduler_config=loaded.scheduler_config),
    denoise_fn=section("guidance", guidance_lib.classifier_free, denoise_fn=loaded.denoise),
    conditional_fn=loaded.denoise,
    levels=schedulers.training_table(loaded.scheduler_config),
    prediction_type=schedulers.network_prediction_type(loaded.scheduler_config),
    latent_shape=loaded.latent_shape,
    decode=lambda frozen, x_0: loaded.decode(frozen["vae"], x_0),
  )
  frozen = {
    "base": policy.base,
    "reference": policy.reference(),
    **{
      name: sharding.place_params(params, mesh)
      for name, params in loaded.params.items()
      if name != "unet"
    },
  }
  condition = make_condition(loaded)
  sample = make_sample(parts, condition, policy)

  def sample_fn(params, frozen, token_ids, seed, name, i, j, start=None):
    key_start, key_steps = jax.random.split(streams.stream(seed, name, i, j))
    x_T = jax.random.normal(key_start, (len(token_ids), *loaded.latent_shape))
    x_T = x_T if start is None else x_T[start]
    token_ids, x_T = sharding.constrain_batch((token_ids, x_T), mesh)
    return sample(params, frozen, token_ids, x_T, key_steps)

  def encode_fn(frozen, images, seed, i, j):
    key = streams.stream(seed, "encoding", i, j)
    images = images / 255.0 if images.dtype == jnp.uint8 else images
    x_0 = loaded.encode_images(frozen["vae"], images.reshape(-1, *images.shape[-3:]), key)
    return x_0.reshape(*images.shape[:-3], *x_0.shape[1:])

  def kl_fn(params, frozen, sampled):
    frozen = policy.ready(params, frozen)
    kl = log_ratios.trajectory_kl(
      policy.variables(params, frozen["base"]),
      frozen["reference"],
      parts.denoise_fn,
      parts.process,
      sampled.rollout.x,
      sampled.cond,
    )
    return jnp.sum(kl, axis=0)

  placed = sampled_shardings(mesh)
  return System(
    mesh=mesh,
    model=loaded,
    parts=parts,
    policy=policy,
    frozen=frozen,
    sample=sample,
    sample_fn=placement.jit(sample_fn, mesh, out_shardings=placed),
    condition_fn=placement.jit(condition, mesh, out_shardings=placed.cond),
    encode_fn=placement.jit(encode_fn, mesh, out_shardings=sharding.batch(mesh)),
    kl_fn=placement.jit(kl_fn, mesh, out_shardings=sharding.replicated(mesh)),
  )


def from_config(config: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None) -> System:
  """The system of a run's whole config, on one device or on `mesh`."""
  names = ("model", "lora", "process", "guidance")
  return make_system(seed=config["seed"], mesh=mesh, **{name: config[name] for name in names})


def sampled_shardings(mesh: jax.sharding.Mesh) -> Any:
  """Where a `Sampled` lies, in its own shape: cut along its images."""
  first: Any = sharding.batch(mesh)
  second: Any = sharding.batch(mesh, axis=1)
  cond = guidance_lib.Guided(first, sharding.replicated(mesh))
  return Sampled(rollout_lib.Rollout(x=second, log_prob=second), cond, images=first)


def place_policy(
  made: policy_lib.Policy, loaded: stable_diffusion.StableDiffusion, mesh: jax.sharding.Mesh
) -> policy_lib.Policy:
  """The policy with its arrays on the mesh, frozen ones as the model says that they are stored."""
  return made._replace(
    params=sharding.place_params(made.params, mesh),
    base=sharding.place_params(made.base, mesh, loaded.stored_dtypes(made.base)),
  )


def make_condition(
  model: stable_diffusion.StableDiffusion,
) -> Callable[[Mapping[str, Params], Array], guidance_lib.Guided]:
  """The pure function from prompts to what the policy sees of them, and of the empty prompt."""
  empty_ids = model.tokenize([""])

  def condition(frozen, token_ids):
    # Apart from the others: a batch of one more row is one that no devices share evenly.
    uncond = jax.tree.map(placement.whole, model.encode_text(frozen, empty_ids))
    return guidance_lib.Guided(model.encode_text(frozen, token_ids), uncond)

  return condition


def make_sample(
  parts: methods.Parts,
  condition: Callable[[Mapping[str, Params], Array], guidance_lib.Guided],
  policy: policy_lib.Policy,
) -> Callable[[Params, Mapping[str, Params], Array, Array, Key], Sampled]:
  """The pure function from prompts and initial noise to images and their whole trajectory."""

  def sample(params, frozen, token_ids, x_T, key):
    cond = condition(frozen, token_ids)
    frozen = policy.ready(params, frozen)
    rolled = rollout_lib.rollout(
      key,
      policy.variables(params, frozen["base"]),
      parts.denoise_fn,
      parts.process,
      x_T,
      cond,
      rollout_lib.mean_over_latents,
    )
    return Sampled(rolled, cond, parts.decode(frozen, rolled.x_0))

  return sample
