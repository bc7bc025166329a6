"""Methods by name. `METHODS[name](**kwargs)` composes losses and diffusion into a `Method`."""

from collections.abc import Callable

from jaxalign.checks import check_call
from jaxalign.methods import ddpo
from jaxalign.methods.base import Method, Transitions

__all__ = ["METHODS", "Method", "Transitions", "make"]

METHODS: dict[str, Callable[..., Method]] = {
  "ddpo": ddpo.make_importance_sampling,
  "ddpo_sf": ddpo.make_score_function,
}


def make(name: str, **kwargs) -> Method:
  """The method called `name`, an entry of `METHODS`."""
  if name not in METHODS:
    raise ValueError(f"config.method.name: unknown method {name!r}; known: {', '.join(METHODS)}")
  check_call(f"config.method {name!r}", METHODS[name], **kwargs)
  return METHODS[name](**kwargs)
