"""The policy: which parameters are trained, which are frozen, and how they make one network."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import traverse_util

from jaxalign.models import lora as lora_lib
from jaxalign.types import Key, Params


class Policy(NamedTuple):
  """A denoiser split into a trained and a frozen tree.

  params: the trained tree, `{"lora": ...}` or `{"params": ...}`.
  base: the frozen rest of the variables; no leaves when everything is trained.
  variables: `(params, base) -> variables` for `denoise`. With `params` as made here the network is
    the reference.
  at_strength: `(params, strength) -> params`, with that much of the training applied: 0 is the
    reference, 1 is `params`. Adapters are scaled (arXiv:2309.17400, section 4.3), weights are
    interpolated (arXiv:2109.01903).
  """

  params: Params
  base: Params
  variables: Callable[[Params, Params], Params]
  at_strength: Callable[[Params, float], Params]


def make_policy(
  unet_params: Params, key: Key, *, rank: int, alpha: float, targets: str
) -> Policy:
  """LoRA adapters of `rank` on the layers that match `targets`, or at rank 0 those layers' weights.

  Args:
    unet_params: the pretrained denoiser, which the result shares its arrays with.
    key: initialises the adapters.
    rank: of the adapters; 0 trains the weights of the layers instead.
    alpha: the adapter is applied times `alpha / rank` (arXiv:2106.09685, section 4.1); without
      effect at rank 0.
    targets: regular expression, searched for in the slash-joined path of each layer. At rank 0
      norms are layers too, and "" trains every parameter.
  """
  if rank == 0:
    return _make_full(unet_params, targets)
  scale = alpha / rank
  lora = lora_lib.init(key, unet_params, rank=rank, targets=targets)

  def variables(params: Params, base: Params) -> Params:
    return {**base, "lora": lora_lib.scaled(params["lora"], scale)}

  def at_strength(params: Params, strength: float) -> Params:
    return {"lora": lora_lib.scaled(params["lora"], strength)}

  return Policy({"lora": lora}, {"params": unet_params}, variables, at_strength)


def _make_full(unet_params: Params, targets: str) -> Policy:
  leaves = traverse_util.flatten_dict(unet_params)
  layers = dict.fromkeys("/".join(path[:-1]) for path in leaves)
  matching = lora_lib.match(list(layers), targets)
  trained, frozen = {}, {}
  for path, leaf in leaves.items():
    if "/".join(path[:-1]) in matching:
      trained[path] = leaf
    else:
      frozen[path] = leaf

  def variables(params: Params, base: Params) -> Params:
    leaves = {
      **traverse_util.flatten_dict(base["params"]),
      **traverse_util.flatten_dict(params["params"]),
    }
    return {"params": traverse_util.unflatten_dict(leaves)}

  initial = {"params": traverse_util.unflatten_dict(trained)}

  def at_strength(params: Params, strength: float) -> Params:
    return jax.tree.map(lambda old, new: old + strength * (new - old), initial, params)

  return Policy(
    initial, {"params": traverse_util.unflatten_dict(frozen)}, variables, at_strength
  )
