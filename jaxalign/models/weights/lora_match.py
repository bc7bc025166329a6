"""Which layer of which network each tensor of an adapter file belongs to."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util

from jaxalign import checks
from jaxalign.models.adapters import lora
from jaxalign.models.weights import lora_names, names
from jaxalign.types import Params

Layer = tuple[str, lora_names.Path]  # component and path
Known = Mapping[str, Mapping[str, lora_names.Path]]  # `lora_names.layer_paths` by component
Shapes = Mapping[str, Mapping[lora_names.Path, tuple[int, ...]]]


class Match(NamedTuple):
  """The tensors of a file by what they are of.

  parts: `{layer: {part: name of its tensor}}`.
  unused: the names of tensors that belong to no layer of the model.
  """

  parts: dict[Layer, dict[str, str]]
  unused: list[str]


def match(where: str, tensors: Mapping[str, Any], params: Mapping[str, Params]) -> Match:
  """Sorts the tensors of an adapter file, which have shapes, by the layers of the networks.

  The network is the one whose layers the names fit. What the names begin with decides where that
  leaves a choice, and if they say nothing the shapes do.

  Args:
    where: the file, for messages.
    tensors: by name.
    params: `{component: parameters}` of the networks, arrays or shapes.

  Raises:
    ValueError: no layer that anything fits, two tensors for one part of a layer, a tensor of a
      layer that is no part of an adapter, or networks between which nothing decides.
  """
  known = {name: lora_names.layer_paths(name, _modules(tree)) for name, tree in params.items()}
  shapes = {name: _kernel_shapes(tree) for name, tree in params.items()}
  entries = {name: entry for name in tensors if (entry := lora_names.parse(name))}
  component_of = _components(where, tensors, entries, known, shapes)
  parts: dict[Layer, dict[str, str]] = {}
  unused = [name for name in tensors if name not in component_of]
  for name, component in component_of.items():
    entry = entries[name]
    path = known[component][entry.layer]
    if path not in shapes[component]:
      raise _no_adapter(where, name, component, path, "of a kind that has no adapters here")
    found = parts.setdefault((component, path), {})
    if entry.part in found:
      raise ValueError(
        f"{where}: expected one adapter, found {found[entry.part]} and {name}, both of one layer\n"
        "save one of the adapters in a file of its own"
      )
    found[entry.part] = name
  if not parts:
    few = checks.first(sorted(tensors)) or "none"
    raise ValueError(
      f"{where} fits no layer of this model ({', '.join(params)})\nits tensors: {few}"
    )
  for name in unused:
    for component in params if name not in entries else ():
      owner = lora_names.owner(name, known[component])
      if owner is not None:
        raise _no_adapter(where, name, component, owner, "and is no part of LoRA")
  return Match(parts, unused)


def without_units(shape: Sequence[int]) -> tuple[int, ...]:
  """The shape without trailing ones: 1 x 1 convolutions are stored as matrices and vice versa."""
  shape = tuple(shape)
  while shape and shape[-1] == 1:
    shape = shape[:-1]
  return shape


def _modules(tree: Params) -> list[lora_names.Path]:
  """The paths of everything that has parameters: layers, norms, embeddings."""
  return list(dict.fromkeys(path[:-1] for path in traverse_util.flatten_dict(tree) if path[:-1]))


def _kernel_shapes(tree: Params) -> dict[lora_names.Path, tuple[int, ...]]:
  """On disk, of the layers that can have adapters."""
  return {
    path: names.torch_shape(("kernel",), layer["kernel"].shape)
    for path, layer in lora.adaptable_layers(tree)
  }


def _components(
  where: str,
  tensors: Mapping[str, Any],
  entries: Mapping[str, lora_names.Entry],
  known: Known,
  shapes: Shapes,
) -> dict[str, str]:
  """The component of each tensor that belongs to one."""
  groups: dict[Any, list[str]] = collections.defaultdict(list)
  for name, entry in entries.items():
    fitting = tuple(component for component in known if entry.layer in known[component])
    groups[entry.component, fitting].append(name)
  found: dict[str, str] = {}
  for (said, fitting), group in groups.items():
    if said in fitting:
      owner = said
    elif not fitting or (said is not None and said not in known):
      continue  # of no layer, or of a network that this model does not have
    else:
      counts = [
        sum(
          _fits(entries[name], tensors[name].shape, known[component], shapes[component])
          for name in group
        )
        for component in fitting
      ]
      if len(fitting) > 1 and counts.count(max(counts)) > 1:
        raise ValueError(
          f"{where}: {group[0]} fits {' and '.join(fitting)} alike; expected names that begin with "
          f'one of them\nname the tensors of the file "{fitting[0]}.{group[0]}"'
        )
      owner = fitting[counts.index(max(counts))]
    found |= dict.fromkeys(group, owner)
  return found


def _fits(
  entry: lora_names.Entry,
  shape: Sequence[int],
  known: Mapping[str, lora_names.Path],
  shapes: Mapping[lora_names.Path, tuple[int, ...]],
) -> bool:
  """Whether one of the two matrices has a shape for its layer, whatever the rank."""
  kernel = shapes.get(known[entry.layer])
  if kernel is None or entry.part == "alpha" or not shape:
    return False
  if entry.part == "a":
    return without_units(shape[1:]) == without_units(kernel[1:])
  return shape[0] == kernel[0]


def _no_adapter(
  where: str, name: str, component: str, path: lora_names.Path, what: str
) -> ValueError:
  layer = lora_names.module_of_component(component, path)
  return refusal(where, f"{name}, which belongs to the layer {layer} {what}")


def refusal(where: str, held: str) -> ValueError:
  """What to say of a file that holds more than LoRA, which would be half applied."""
  return ValueError(
    f"{where} holds {held}; only plain LoRA can be applied\n"
    "merge it into the model with the tool that made it, and give that as --model"
  )
