"""Model families by the class that a model's folder names: `open_model(path, **options)`."""

from typing import Any

from jaxalign import checks
from jaxalign.models.model import Model


def open_model(path: str, **options: Any) -> Model:
  from jaxalign.models.families import stable_diffusion

  checks.check_call("config.model", stable_diffusion.open_model, path, **options)
  return stable_diffusion.as_model(stable_diffusion.open_model(path, **options))
