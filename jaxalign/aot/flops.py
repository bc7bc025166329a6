"""Floating-point operations of matrix products and convolutions: needed at least, and compiled.

Both counts follow one convention. A product counts 2 operations a multiplication, taps that fall on
padding or on the zeros of a dilation included and excluded respectively. Everything that is not a
product counts nothing. What is needed counts a loop's passes; `compiled` counts its body once, as
XLA's own analysis has it (`work` counts passes too).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.extend import core

# Operations through which a kernel remains the kernel of its layer.
_SAME_KERNEL = {"convert_element_type", "reshape", "transpose", "squeeze", "slice", "copy"}


@dataclasses.dataclass
class Minimum:
  """The least that a network's forward pass, and the gradient after it, must compute."""

  forward: float = 0.0
  backward: float = 0.0

  @property
  def gradient(self) -> float:
    """Of a program that computes value and gradient."""
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class _Variable:
  layer: str | None = None  # the layer whose kernel this is
  depends: bool = False  # on what is trained


def minimum(
  function: Callable,
  params: Any,
  *args: Any,
  trained: Collection[str] = (),
  adapted: Collection[str] = (),
  rank: int = 0,
  through_input: bool = False,
) -> Minimum:
  """Counts `function(params, *args)`, a network without adapters; arrays or shapes.

  The rule: each product once forward, and once more for each of its two factors that depends on
  something trained. So a trained layer costs three, a frozen one two where the gradient passes
  through it and one where it does not, and the two products of an attention two more each. An
  adapter is two small layers beside the frozen one.

  Args:
    trained: layers (slash-joined paths) whose kernels are.
    adapted: layers that have an adapter of `rank`.
    through_input: the first of `args` depends on something trained.
  """
  closed = jax.make_jaxpr(function)(params, *args)
  paths = jax.tree_util.tree_flatten_with_path(params)[0]
  layers = ["/".join(key.key for key in path[:-1]) for path, _ in paths]
  variables = [_Variable(layer, layer in trained) for layer in layers]
  first = len(jax.tree.leaves(args[0]))
  rest = len(closed.jaxpr.invars) - len(variables) - first
  variables += [_Variable(depends=through_input)] * first + [_Variable()] * rest
  counter = _Counter(frozenset(adapted), rank)
  counter.run(closed.jaxpr, variables)
  return counter.total


@dataclasses.dataclass
class _Counter:
  adapted: frozenset[str]
  rank: int
  passes: int = 1  # of the loops that the equation at hand is in
  total: Minimum = dataclasses.field(default_factory=Minimum)

  def run(self, jaxpr: core.Jaxpr, inputs: list[_Variable]) -> list[_Variable]:
    known: dict[Any, _Variable] = dict(zip(jaxpr.invars, inputs, strict=True))

    def look_up(atom):
      return _Variable() if isinstance(atom, core.Literal) else known.get(atom, _Variable())

    for eqn in jaxpr.eqns:
      given = [look_up(atom) for atom in eqn.invars]
      results = self._equation(eqn, given)
      known.update(zip(eqn.outvars, results, strict=True))
    return [look_up(atom) for atom in jaxpr.outvars]

  def _equation(self, eqn, given: list[_Variable]) -> list[_Variable]:
    name = eqn.primitive.name
    if name in ("dot_general", "conv_general_dilated"):
      return [self._product(eqn, given)]
    inner = _inner_jaxpr(eqn)
    if inner is not None:
      passes, self.passes = self.passes, self.passes * eqn.params.get("length", 1)
      results = self.run(inner, given[len(given) - len(inner.invars) :])
      self.passes = passes
      return results
    depends = any(variable.depends for variable in given)
    layer = given[0].layer if given and name in _SAME_KERNEL else None
    return [_Variable(layer, depends)] * len(eqn.outvars)

  def _product(self, eqn, given: list[_Variable]) -> _Variable:
    left, right = given
    shapes = [atom.aval.shape for atom in (*eqn.invars, *eqn.outvars)]
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      inner = math.prod(shapes[0][axis] for axis in contracted)
      features = shapes[2][-1]
    else:
      numbers = eqn.params["dimension_numbers"]
      features = shapes[1][numbers.rhs_spec[0]]
      inner = math.prod(shapes[1]) // features
    cost = 2.0 * self.passes * math.prod(shapes[2]) * inner
    self.total.forward += cost
    self.total.backward += cost * (left.depends + right.depends)
    depends = left.depends or right.depends
    if right.layer in self.adapted:
      self._adapter(math.prod(shapes[2]) // features, inner, features, left.depends)
      depends = True
    return _Variable(depends=depends)

  def _adapter(self, rows: int, inner: int, features: int, input_depends: bool) -> None:
    down, up = (2.0 * self.passes * rows * self.rank * width for width in (inner, features))
    self.total.forward += down + up
    self.total.backward += 2.0 * up + down * (1 + input_depends)


def _inner_jaxpr(eqn) -> core.Jaxpr | None:
  """The program that an equation calls; of a choice by platform the last, the plain form."""
  if eqn.primitive.name == "cond":
    return eqn.params["branches"][-1].jaxpr
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    if name in eqn.params:
      return getattr(eqn.params[name], "jaxpr", eqn.params[name])
  return None


_INSTRUCTION = re.compile(r"%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\((.*)$")


def compiled(text: str) -> float:
  """Counts the products in a compiled program's HLO."""
  shapes: dict[str, tuple[int, ...]] = {}
  products = []
  for line in text.splitlines():
    match = _INSTRUCTION.search(line.strip().removeprefix("ROOT "))
    if match is None:
      continue
    name, dims, opcode, rest = match.groups()
    shapes[name] = tuple(int(size) for size in dims.split(",") if size)
    if opcode in ("dot", "convolution"):
      operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
      products.append((opcode, shapes[name], operands, rest))
  return float(sum(_cost(*product, shapes) for product in products))


def _cost(opcode: str, out: tuple[int, ...], operands, rest: str, shapes) -> float:
  if opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    axes = [int(axis) for axis in contracted[1].split(",")] if contracted else []
    return 2.0 * math.prod(out) * math.prod(shapes[operands[0]][axis] for axis in axes)
  kernel = shapes[operands[1]]
  labels = re.search(r"dim_labels=\w+_(\w+)->", rest)
  assert labels is not None
  inner = math.prod(size for size, label in zip(kernel, labels[1], strict=True) if label != "o")
  dilation = re.search(r"lhs_dilate=([\dx]+)", rest)
  zeros = np.prod([int(size) for size in dilation[1].split("x")]) if dilation else 1
  return 2.0 * math.prod(out) * inner / zeros
