"""The policy: which parameters are trained, which are frozen, and how they make one network."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models import lora as lora_lib
from jaxalign.types import Key, Params


class Policy(NamedTuple):
  """A denoiser split into a trained and a frozen tree.

  params: the trained tree, `{"lora": ...}` or `{"params": ...}`.
  base: the frozen rest of the variables; empty when everything is trained.
  variables: `(params, base) -> variables` for `denoise`. With `params` as made here the network is
    the reference.
  """

  params: Params
  base: Params
  variables: Callable[[Params, Params], Params]


def make_policy(
  unet_params: Params, key: Key, *, rank: int, alpha: float, targets: str
) -> Policy:
  """LoRA adapters of `rank` on the layers that match `targets`, or the whole network at rank 0.

  Args:
    unet_params: the pretrained denoiser; its arrays are copied where they are trained.
    key: initialises the adapters.
    rank: of the adapters; 0 trains every parameter.
    alpha: the adapter is applied times `alpha / rank` (arXiv:2106.09685, section 4.1).
    targets: regular expression over slash-joined layer paths, as `lora.init` takes it.
  """
  if rank == 0:
    return Policy({"params": jax.tree.map(jnp.array, unet_params)}, {}, _full)
  scale = alpha / rank
  lora = lora_lib.init(key, unet_params, rank=rank, targets=targets)

  def variables(params: Params, base: Params) -> Params:
    return {**base, "lora": lora_lib.scaled(params["lora"], scale)}

  return Policy({"lora": lora}, {"params": unet_params}, variables)


def _full(params: Params, base: Params) -> Params:
  return {**base, **params}
