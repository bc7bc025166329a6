"""What a denoiser computes in and stores its weights in: options that all families share."""

import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.adapters import preparation
from jaxalign.models.networks import rematerialization
from jaxalign.types import Params

DTYPES = ("float32", "bfloat16")


def check(*, dtype: str, param_dtype: str, remat: str = "none") -> None:
  """Raises ValueError, naming the field of the config, for options that do not go together."""
  checks.check_choice("model.dtype", dtype, DTYPES)
  checks.check_choice("model.param_dtype", param_dtype, DTYPES)
  if param_dtype == "bfloat16" and dtype != "bfloat16":
    raise ValueError(
      "model.param_dtype: expected float32, because the denoiser computes in float32 "
      "(model.dtype); got bfloat16\nset both to bfloat16, or neither"
    )
  checks.check_choice("model.remat", remat, rematerialization.REMAT)


def narrow(dtype: str) -> str | None:
  """The dtype as `models.model.Model` has it: None is that of the parameters, float32."""
  return None if dtype == "float32" else dtype


def stored_dtypes(variables: Params, param_dtype: str) -> Params:
  """What each frozen array of a denoiser is stored in on devices; norms are float32 always."""
  own = jax.tree.map(lambda leaf: leaf.dtype, variables["params"])
  return {"params": preparation.map_layers(lambda _: jnp.dtype(param_dtype), own)}
