"""The sections of configs that make an embedded model, and the functions that they feed.

As `cli.sections` has those of a run that aligns one.
"""

from collections.abc import Mapping
from typing import Any

from jaxalign import checks
from jaxalign.cli.sections import Check, owned_by
from jaxalign.recipes import shapes_model, shapes_reward
from jaxalign.training import fit, optim, reward_model


def _fit(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  del sections
  own = ("num_steps", "log_every", "checkpoint_every")
  given = dict.fromkeys(("name", "workdir", "params", "loss_fn", "batches", "key"))
  section = checks.check_section(what, section, fit.fit, **given)
  rest = {key: value for key, value in section.items() if key not in own}
  checks.check_section(what, rest, optim.make, decay_steps=None)
  for name in own:
    checks.check_range(f"{what}.{name}", section[name], 0 if name == "checkpoint_every" else 1)


def _pretrain(*, flow: str, seed: int, data: Any, model: Any, autoencoder: Any, denoiser: Any):
  """The sections of `configs/pretrain_shapes.py`."""


def _autoencoder(*, num_images: int, batches: Any, kl_weight: float, fit: Any):
  """Of that config, what its autoencoder is fitted with."""


def _taken(*, path: str):
  """Of that config, the model whose autoencoder is taken."""


def _check_autoencoder(what: str, section: Any, sections: Mapping[str, Any]) -> None:
  taken = isinstance(section, Mapping) and "path" in section
  owned_by(_taken if taken else _autoencoder)(what, section, sections)


def _denoiser(*, batches: Any, timesteps: Any, fit: Any):
  """Of that config, what text encoder and denoiser are fitted with."""


def _reward_model(
  *,
  flow: str,
  seed: int,
  init_from: str,
  data: Any,
  held_out: str,
  model: Any,
  warm_start: Any,
  preferences: Any,
):
  """The sections of `configs/reward_model.py`."""


def _warm_start(*, batches: Any, augmentation: Any, fit: Any):
  """Of that config, what the model is fitted with before it sees preferences."""


def _preferences(*, batches: Any, logit_scale: float, fit: Any):
  """Of that config, what it is fitted with on preferences."""


# By flow, the sections and those within, outer ones first.
OWNERS: dict[str, dict[str, Check]] = {
  "pretrain": {
    "": owned_by(_pretrain),
    "data": owned_by(shapes_model.draw_dataset, "seed"),
    "autoencoder": _check_autoencoder,
    "autoencoder.batches": owned_by(shapes_model.image_batches, "images", "seed"),
    "autoencoder.fit": _fit,
    "denoiser": owned_by(_denoiser),
    "denoiser.batches": owned_by(
      shapes_model.caption_batches, "latents", "tokens", "empty", "seed"
    ),
    "denoiser.timesteps": owned_by(shapes_model.make_denoising_loss, "model"),
    "denoiser.fit": _fit,
  },
  "reward_model": {
    "": owned_by(_reward_model),
    "data": owned_by(reward_model.load_pairs),
    "warm_start": owned_by(_warm_start),
    "warm_start.batches": owned_by(shapes_reward.scene_batches, "tokenize", "seed"),
    "warm_start.augmentation": owned_by(shapes_reward.make_contrastive_loss, "model"),
    "warm_start.fit": _fit,
    "preferences": owned_by(_preferences),
    "preferences.batches": owned_by(reward_model.pair_batches, "pairs", "of_prompts", "seed"),
    "preferences.fit": _fit,
  },
}


def check(sections: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the field, unless every section of the config fits its owner."""
  for name, check_fn in OWNERS[sections["flow"]].items():
    section: Any = sections
    for part in filter(None, name.split(".")):
      section = section.get(part)
    if section is None:
      continue  # of an autoencoder that is taken from another model
    check_fn(f"config.{name}" if name else "config", section, sections)
  checks.check_seed("config.seed", sections["seed"])
