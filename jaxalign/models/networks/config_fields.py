"""From a component's parsed config.json to the arguments of the dataclass that reads it."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def of(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
  """The entries that fields of `config_class` are named after, lists as tuples; others are left."""
  names = {field.name for field in dataclasses.fields(config_class)}
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in config.items()
    if name in names
  }
