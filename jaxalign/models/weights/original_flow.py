"""Original names of flow transformers: what those of SD3 and FLUX have in common.

Stability AI (arXiv:2403.03206) and Black Forest Labs (arXiv:2506.15742) published transformers with
queries, keys and values in one matrix. Every name that diffusers has of the tensors of a component
is mapped to where the original has them:

  transformer_blocks.3.attn.to_k.weight         joint_blocks.3.x_block.attn.qkv.weight, 2nd third
  transformer_blocks.3.attn.add_v_proj.bias     double_blocks.3.txt_attn.qkv.bias, last third
  single_transformer_blocks.0.proj_mlp.weight   single_blocks.0.linear1.weight, after q, k and v
  norm_out.linear.weight                        final_layer.adaLN_modulation.1.weight, by halves

The tables are in `original_sd3` and `original_flux`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from jaxalign.models.weights import lazy

Shapes = Mapping[str, tuple[int, ...]]  # on disk, by our names in PyTorch
Modules = Mapping[str, tuple[str, ...]]  # ours that are one there, row after row, by its name
# By the name of a list of blocks of ours, the name there and the modules of a block; at "" those of
# no block.
Lists = Mapping[str, tuple[str, Modules]]

PREFIX = "model.diffusion_model."  # of a transformer's tensors where a file has other components
_BLOCK = re.compile(r"(?:(transformer_blocks|single_transformer_blocks)\.(\d+)\.)?(.*)")
# As ComfyUI and what follows it write FLUX; published files say "scale".
_OTHER_SCALE = re.compile(r"(\.norm\.(?:query|key)_norm\.)weight$")


class Source(NamedTuple):
  """Where a tensor is in an original checkpoint.

  name: of the tensor there, without the prefix of its component.
  rows: start, stop and how many there are, if it is some of the rows.
  swapped: whether the two halves of its rows are the other way round.
  """

  name: str
  rows: tuple[int, int, int] | None = None
  swapped: bool = False

  def view(self, stored: lazy.LazyArray) -> lazy.LazyArray:
    """The tensor as diffusers has it, of the one that is `stored` under `name`.

    Raises ValueError for another number of rows, whose parts would begin elsewhere.
    """
    if self.rows is not None:
      start, stop, count = self.rows
      if stored.shape[0] != count:
        raise ValueError(f"{stored.name}: expected {count} rows, found {stored.shape[0]}")
      stored = stored.rows(start, stop)
    if self.swapped:
      half = stored.shape[0] // 2
      stored = stored.rows(half, stored.shape[0]).concatenate(stored.rows(0, half))
    return stored


Names = Callable[[Shapes], dict[str, Source]]


def qkv(theirs: str, ours: str, parts: Iterable[str] = ("to_q", "to_k", "to_v")) -> Modules:
  """Queries, keys and values in one matrix."""
  return {theirs: tuple(f"{ours}.{part}" for part in parts)}


ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")  # of the text in joint attention
# The shift is before the scale there, and behind it here.
NORM_OUT = "norm_out.linear"
FINAL: Modules = {
  "final_layer.adaLN_modulation.1": (NORM_OUT,),
  "final_layer.linear": ("proj_out",),
}


def sources(expected: Shapes, lists: Lists, swapped: Collection[str]) -> dict[str, Source]:
  """By our names; `swapped` are modules of ours that scale and shift."""
  owners = {
    kind: {part: theirs for theirs, parts in modules.items() for part in parts}
    for kind, (_, modules) in lists.items()
  }

  def source(name: str) -> Source:
    module, _, leaf = name.rpartition(".")
    block = _BLOCK.fullmatch(module)
    assert block is not None  # it matches anything
    kind, number, part = block.groups("")
    theirs = owners.get(kind, {}).get(part)
    if theirs is None:
      return Source(name)
    here, there = (f"{of}.{number}." if number else "" for of in (kind, lists[kind][0]))
    stored = f"{there}{theirs}.{'scale' if theirs.endswith('_norm') else leaf}"
    parts = lists[kind][1][theirs]
    if len(parts) == 1:
      return Source(stored, swapped=module in swapped)
    sizes = [expected[f"{here}{one}.{leaf}"][0] for one in parts]
    start = sum(sizes[: parts.index(part)])
    return Source(stored, (start, start + expected[name][0], sum(sizes)))

  return {name: source(name) for name in expected}


def renamed(
  names: Names, tensors: Mapping[str, lazy.LazyArray], expected: Shapes
) -> dict[str, lazy.LazyArray]:
  """The tensors of a transformer under our names, see `safetensors_io.OwnTensors`.

  What is no part of it keeps its name, so that who reads them finds it unexpected.

  Args:
    names: of the kind of transformer.
    tensors: of the file, with the prefix or without.
    expected: the shapes of ours.

  Raises:
    ValueError: a fused matrix of another number of rows, or a tensor under both names.
  """
  stored = of_transformer(tensors)
  places = names(expected)
  found = {
    name: place.view(stored[place.name]) for name, place in places.items() if place.name in stored
  }
  used = {place.name for place in places.values()}
  others = {name: array for name, array in stored.items() if name not in used}
  for name in sorted(found.keys() & others.keys()):
    raise ValueError(f"expected each weight once, found {places[name].name} and {name}")
  return found | others


def of_transformer(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """A file's tensors of the transformer, by their names without the prefix that some files have."""
  if any(name.startswith(PREFIX) for name in tensors):
    own = {n.removeprefix(PREFIX): array for n, array in tensors.items() if n.startswith(PREFIX)}
  else:
    own = dict(tensors)
  for name in list(own):
    published = _OTHER_SCALE.sub(r"\1scale", name)
    if published not in own:
      own[published] = own.pop(name)
  return own


def count(names: Iterable[str], blocks: str) -> int:
  """How many blocks a list has, by the names of tensors; blocks between may be missing."""
  pattern = re.compile(rf"{blocks}\.(\d{{1,6}})\.")
  return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


class Stored(NamedTuple):
  """The shapes of a transformer's tensors; ValueError where these are not those of its kind.

  what: the kind, for messages.
  tensors: from `of_transformer`; anything that has a shape.
  """

  what: str
  tensors: Mapping[str, Any]

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    """Of a tensor that has to be there."""
    if name not in self.tensors:
      raise self.error(f"no {name}")
    shape = tuple(self.tensors[name].shape)
    if len(shape) != rank or 0 in shape:
      raise self.error(f"{name} of shape {shape}")
    return shape

  def blocks(self, name: str) -> int:
    """How many there are in a list; one at least."""
    found = count(self.tensors, name)
    if not found:
      raise self.error(f"no {name}")
    return found

  def error(self, found: str) -> ValueError:
    """For something that is `found`."""
    return ValueError(
      f"expected the transformer of {self.what} under its original names, found {found}"
    )
