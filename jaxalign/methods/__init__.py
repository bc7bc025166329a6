"""Methods by name: `METHODS[name](pipeline, **kwargs)` makes a `Method` of losses and diffusion.

A name with a colon, "package.module:function", is a user's own: a function of the same signature.
"""

from collections.abc import Callable

from jaxalign.checks import check_call, find_function
from jaxalign.methods import (
  d3po,
  ddpo,
  diffusion_dpo,
  direct,
  kto,
  mix_grpo,
  nft,
  online_dpo,
  raft,
  rwr,
)
from jaxalign.methods.base import Head, Method, Records, Rollouts, Stored
from jaxalign.methods.batches import Finished, Inputs, Steps
from jaxalign.pipeline import Pipeline

__all__ = [
  "METHODS",
  "Finished",
  "Head",
  "Inputs",
  "Method",
  "Records",
  "Rollouts",
  "Steps",
  "Stored",
  "make",
]

METHODS: dict[str, Callable[..., Method]] = {
  "ddpo": ddpo.make_importance_sampling,
  "ddpo_sf": ddpo.make_score_function,
  "dpo": diffusion_dpo.make_dpo,
  "ipo": diffusion_dpo.make_ipo,
  "d3po": d3po.make,
  "draft": direct.make_draft,
  "draft_lv": direct.make_draft_lv,
  "align_prop": direct.make_align_prop,
  "refl": direct.make_refl,
  "kto": kto.make,
  "online_dpo": online_dpo.make,
  "nft": nft.make,
  "mix_grpo": mix_grpo.make,
  "raft": raft.make,
  "rwr": rwr.make_exponential,
  "rwr_sparse": rwr.make_sparse,
}


def make(name: str, pipeline: Pipeline, **kwargs) -> Method:
  """The method called `name`: an entry of `METHODS`, or a user's "package.module:function"."""
  what = "config.method.name"
  factory = find_function(what, name, METHODS, unknown=f"{what}: unknown method {name!r}")
  check_call(f"config.method {name!r}", factory, pipeline, **kwargs)
  method = factory(pipeline, **kwargs)
  if not isinstance(method, Method):
    raise ValueError(
      f"config.method.name: expected {name!r} to return a jaxalign.methods.Method, got "
      f"{type(method).__name__}"
    )
  return method
