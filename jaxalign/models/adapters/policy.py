"""The policy: which parameters are trained, which are frozen, and how they make one network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from jaxalign.checks import check_choice
from jaxalign.models.adapters import lora as lora_lib
from jaxalign.models.adapters import preparation
from jaxalign.models.networks import layers
from jaxalign.types import Key, Params

# What a layer with an adapter computes: two paths, or one kernel that holds both.
FORMS = ("side", "merged")


class Policy(NamedTuple):
  """A denoiser split into a trained and a frozen tree.

  params: the trained tree as initialised, `{"lora": ...}` or `{"params": ...}`.
  base: the frozen rest of the variables; no leaves when everything is trained.
  variables: `(params, base) -> variables` for `denoise`. With `params` as made here the network is
    the reference.
  ready: `(params, frozen) -> frozen`, with `frozen["base"]` and `frozen["reference"]` as a loop
    over the network wants them while `params` stay the same. Made once before it; `variables` may
    then be called in it. Without that, each of its steps would cast all weights.
  """

  params: Params
  base: Params
  variables: Callable[[Params, Params], Params]
  ready: Callable[[Params, Mapping[str, Params]], dict[str, Params]]

  def reference(self) -> Params:
    """The variables that training starts from; their arrays are shared, no second copy."""
    if "lora" in self.params:
      return {"params": self.base["params"]}
    return self.variables(self.params, self.base)

  def at_strength(self, params: Params, strength: float) -> Params:
    """`params` with that much of the training applied: 0 is the reference, 1 is `params`.

    Adapters are scaled (arXiv:2309.17400, section 4.3), weights interpolated (arXiv:2109.01903).
    """
    if strength == 1.0:  # to the bit, and no program for each shape of a weight
      return params
    if "lora" in params:
      return {"lora": lora_lib.scaled(params["lora"], strength)}
    return jax.tree.map(lambda old, new: old + strength * (new - old), self.params, params)


def make_policy(
  denoiser: Params,
  key: Key,
  *,
  rank: int,
  alpha: float,
  targets: str,
  form: str = "side",
  dtype: Any = None,
) -> Policy:
  """LoRA adapters of `rank` on the layers that match `targets`, or at rank 0 those layers' weights.

  Args:
    denoiser: its pretrained parameters, which the result shares its arrays with.
    key: initialises the adapters.
    rank: of the adapters; 0 trains the weights of the layers instead.
    alpha: the adapter is applied times `alpha / rank` (arXiv:2106.09685, section 4.1); without
      effect at rank 0.
    targets: regular expression, searched for in the slash-joined path of each layer. At rank 0
      norms are layers too, and "" trains every parameter but the constants of the network.
    form: "side", the exact one: a layer adds `(x @ a) @ b`. "merged": rollouts and updates use one
      kernel, `kernel + a @ b` in the dtype of the computation, which is nearly free; in bfloat16 it
      rounds off what an adapter adds below 1 / 256 of a weight. The gradient is the side path's.
    dtype: what the denoiser computes in; None is the dtype of its parameters.
  """
  check_choice("config.lora.form", form, FORMS)
  if rank == 0:
    return _make_full(denoiser, targets, dtype)
  scale = alpha / rank
  lora = lora_lib.init(key, denoiser, rank=rank, targets=targets)

  def variables(params: Params, base: Params) -> Params:
    return {**base, "lora": lora_lib.scaled(params["lora"], scale)}

  def ready(params: Params, frozen: Mapping[str, Params]) -> dict[str, Params]:
    kernels = frozen["base"]["params"]
    scaled = lora_lib.scaled(params["lora"], scale)
    made = preparation.ready({}, scaled, kernels, dtype, merged=form == "merged")
    return _with_base(frozen, {"params": kernels}, made, dtype)

  return Policy({"lora": lora}, {"params": denoiser}, variables, ready)


def _make_full(denoiser: Params, targets: str, dtype: Any) -> Policy:
  leaves = traverse_util.flatten_dict(denoiser)
  owners = dict.fromkeys("/".join(path[:-1]) for path in leaves)
  matching = lora_lib.match(list(owners), targets)
  trained, frozen = {}, {}
  for path, leaf in leaves.items():
    if "/".join(path[:-1]) in matching and path[-1] not in layers.CONSTANTS:
      trained[path] = leaf
    else:
      frozen[path] = leaf

  def variables(params: Params, base: Params) -> Params:
    leaves = {
      **traverse_util.flatten_dict(base["params"]),
      **traverse_util.flatten_dict(params["params"]),
    }
    return {**base, "params": traverse_util.unflatten_dict(leaves)}

  def ready(params: Params, frozen: Mapping[str, Params]) -> dict[str, Params]:
    made = preparation.ready(params["params"], None, {}, dtype, merged=False)
    return _with_base(frozen, frozen["base"], made, dtype)

  initial = {"params": traverse_util.unflatten_dict(trained)}
  return Policy(initial, {"params": traverse_util.unflatten_dict(frozen)}, variables, ready)


def _with_base(
  frozen: Mapping[str, Params], base: Params, made: Params, dtype: Any
) -> dict[str, Params]:
  """The frozen trees with those of the denoiser cast, and what was made of the trained ones."""
  base = {"params": preparation.cast(base["params"], dtype), **({"ready": made} if made else {})}
  # It has adapters too where it is a copy of the policy.
  params = preparation.cast(frozen["reference"]["params"], dtype)
  reference = {**frozen["reference"], "params": params}
  return {**frozen, "base": base, "reference": reference}
