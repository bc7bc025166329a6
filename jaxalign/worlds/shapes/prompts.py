"""Prompts about scenes of shapes: grammar, split, and the scenes that make a prompt true.

The six categories are those of GenEval (Ghosh et al. 2023, arXiv:2310.11513). Every prompt parses
to a `Spec`, the facts it claims; the split into training and held-out prompts is over facts, so
that two wordings of the same facts are never on different sides.
"""

import dataclasses
import functools
import hashlib
import itertools

import numpy as np

from jaxalign import streams
from jaxalign.worlds.shapes import scene

NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITES = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
SIZES = {1: (18.0, 26.0), 2: (18.0, 24.0), 3: (14.0, 18.0), 4: (14.0, 18.0)}  # pixels, by count
COUNTED_SIZES = (14.0, 18.0)  # counting prompts: the size must not give the number away
MIN_GAP = 3.0  # pixels between bounding squares, and half of it to the border

GRAMMAR = f"""lower-case words in one of these forms, shapes and colours of a pair differing:
  single_object: a SHAPE on a GROUND ground; colours: a COLOUR SHAPE; counting: NUMBER SHAPEs;
  two_objects: a SHAPE and a SHAPE; position: a SHAPE RELATION a SHAPE;
  colour_attribution: a COLOUR SHAPE and a COLOUR SHAPE
  SHAPE: {", ".join(scene.SHAPES)}; COLOUR: {", ".join(scene.COLOURS)};
  GROUND: {", ".join(scene.GROUNDS)}; NUMBER: {", ".join(NUMBERS)};
  RELATION: {", ".join(RELATIONS)}"""


@dataclasses.dataclass(frozen=True)
class Group:
  """`count` objects of one shape, all of `colour` unless it is None (free)."""

  shape: str
  colour: str | None = None
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a prompt claims. The scene holds the objects of `groups` and nothing else.

  `relation` says where the first group is, seen from the second; `ground` None means free.
  """

  category: str
  groups: tuple[Group, ...]
  relation: str | None = None
  ground: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
  text: str
  category: str
  spec: Spec


def _noun(group: Group) -> str:
  if group.count > 1:
    number = next(word for word, value in NUMBERS.items() if value == group.count)
    plural = "es" if group.shape.endswith("s") else "s"
    return f"{number} {group.shape}{plural}"
  words = f"{group.colour} {group.shape}" if group.colour else group.shape
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def to_text(spec: Spec) -> str:
  """The one wording of a spec."""
  joint = f" {spec.relation or 'and'} "
  text = joint.join(_noun(group) for group in spec.groups)
  return text if spec.ground is None else f"{text} on a {spec.ground} ground"


def _all_specs() -> dict[str, list[Spec]]:
  """Every spec of every category, both orders of a pair included."""
  shapes, colours = tuple(scene.SHAPES), tuple(scene.COLOURS)
  shape_pairs = tuple(itertools.permutations(shapes, 2))
  colour_pairs = tuple(itertools.permutations(colours, 2))
  fields: dict[str, list[tuple]] = {  # of Spec, after the category
    "single_object": [((Group(s),), None, g) for s in shapes for g in scene.GROUNDS],
    "colours": [((Group(s, c),),) for s in shapes for c in colours],
    "two_objects": [((Group(s), Group(t)),) for s, t in shape_pairs],
    "counting": [((Group(s, None, n),),) for s in shapes for n in NUMBERS.values()],
    "position": [((Group(s), Group(t)), r) for s, t in shape_pairs for r in RELATIONS],
    "colour_attribution": [
      ((Group(s, c), Group(t, d)),) for s, t in shape_pairs for c, d in colour_pairs
    ],
  }
  return {name: [Spec(name, *row) for row in rows] for name, rows in fields.items()}


CATEGORIES = tuple(_all_specs())


def canonical(spec: Spec) -> Spec:
  """The same spec for all wordings of the same facts: the order of the two groups is fixed."""
  groups = tuple(sorted(spec.groups, key=lambda group: (group.shape, group.colour or "")))
  if groups == spec.groups or spec.relation is None:
    return dataclasses.replace(spec, groups=groups)
  return dataclasses.replace(spec, groups=groups, relation=OPPOSITES[spec.relation])


HELD_OUT_FRACTION = 0.22
# Of the held-out facts of a category, at least one: where a category has few, the test needs them.
VALIDATION_FRACTION = 1 / 3
SPLIT_SEED = 0


@functools.cache
def _split() -> tuple[tuple[Prompt, str], ...]:
  """Every prompt and its split: of each category a fixed share of its distinct facts is held out.

  The order comes from SHA-256, which no version of Python or numpy will ever change.
  """
  prompts: list[tuple[Prompt, str]] = []
  for category, specs in _all_specs().items():
    facts = sorted(
      {to_text(canonical(spec)) for spec in specs},
      key=lambda text: hashlib.sha256(f"{SPLIT_SEED} {category} {text}".encode()).hexdigest(),
    )
    held_out = round(HELD_OUT_FRACTION * len(facts))
    validation = max(1, int(VALIDATION_FRACTION * held_out))
    split_of = dict.fromkeys(facts, "train")
    split_of |= dict.fromkeys(facts[:held_out], "test")
    split_of |= dict.fromkeys(facts[:validation], "validation")
    prompts += [
      (Prompt(to_text(spec), category, spec), split_of[to_text(canonical(spec))]) for spec in specs
    ]
  return tuple(prompts)


def _of(*splits: str) -> list[Prompt]:
  return [prompt for prompt, split in _split() if split in splits]


def train_prompts() -> list[Prompt]:
  return _of("train")


def held_out_prompts() -> list[Prompt]:
  """Those of validation and test."""
  return _of("validation", "test")


def validation_prompts() -> list[Prompt]:
  """Held out for what selects: checkpoints, hyper-parameters."""
  return _of("validation")


def test_prompts() -> list[Prompt]:
  """Held out for what reports, and selects nothing."""
  return _of("test")


@functools.cache
def _table() -> dict[str, Spec]:
  return {prompt.text: prompt.spec for prompt, _ in _split()}


def parse(text: str) -> Spec:
  """The facts of a prompt; capitals and spacing do not matter.

  Raises:
    ValueError: the text is outside the grammar.
  """
  try:
    return _table()[" ".join(text.lower().split())]
  except KeyError:
    raise ValueError(
      f"expected a prompt of the shapes world, got {text!r}: use {GRAMMAR}"
    ) from None


def sample_prompts(seed: int | np.random.Generator, n: int, split: str = "train") -> list[Prompt]:
  """`n` prompts, drawn with replacement, categories balanced to within one, in random order.

  Args:
    seed: an int or a numpy generator; equal seeds give equal prompts.
    n: how many.
    split: "train" or "held_out".
  """
  if split not in ("train", "held_out"):
    raise ValueError(f"expected split 'train' or 'held_out', got {split!r}")
  rng = seed if isinstance(seed, np.random.Generator) else streams.generator(seed, "scene prompts")
  by_category: dict[str, list[Prompt]] = {category: [] for category in CATEGORIES}
  for prompt in train_prompts() if split == "train" else held_out_prompts():
    by_category[prompt.category].append(prompt)
  categories = [CATEGORIES[i] for i in rng.permutation(n) % len(CATEGORIES)]
  return [by_category[c][rng.integers(len(by_category[c]))] for c in categories]


def related(relation: str, dx: float, dy: float, ratio: float = 1.0) -> bool:
  """Whether an object at offset (dx, dy) pixels from another (y down) is `relation` it.

  Exactly one relation holds for any offset: the one along the longer axis, which must be more
  than `ratio` times the shorter.
  """
  along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
  sign = -1 if relation in ("left of", "above") else 1
  return sign * along > ratio * abs(across)


def _place(rng: np.random.Generator, spec: Spec, sizes: np.ndarray) -> np.ndarray:
  """Centres `[N, 2]` (x, y) of bounding squares inside the image, apart, and as `spec` relates."""
  reach = sizes[:, None] / 2 + MIN_GAP / 2
  separation = (sizes[:, None] + sizes[None, :]) / 2 + MIN_GAP
  np.fill_diagonal(separation, 0)
  while True:  # a try succeeds with probability above 1 percent, usually far above
    centres = rng.uniform(reach, scene.IMAGE_SIZE - reach, (len(sizes), 2))
    distance = np.abs(centres[:, None] - centres[None, :]).max(-1)
    if (distance < separation).any():
      continue
    if spec.relation is None:
      return centres
    dx, dy = centres[0] - centres[1]
    # The ratio keeps scenes near a diagonal, where two relations could be argued for, out.
    if related(spec.relation, dx, dy, ratio=1.5):
      return centres


def sample_scene(rng: np.random.Generator, spec: Spec) -> scene.Scene:
  """A random scene of which `spec` is true: what it leaves open is random, nothing is added."""
  wanted = [group for group in spec.groups for _ in range(group.count)]
  low, high = COUNTED_SIZES if spec.category == "counting" else SIZES[len(wanted)]
  sizes = rng.uniform(low, high, len(wanted))
  centres = _place(rng, spec, sizes)
  colours = [group.colour or str(rng.choice(list(scene.COLOURS))) for group in wanted]
  objects = tuple(
    scene.Object(group.shape, colour, float(x), float(y), float(size))
    for group, colour, (x, y), size in zip(wanted, colours, centres, sizes, strict=True)
  )
  ground = spec.ground or str(rng.choice(list(scene.GROUNDS)))
  return scene.Scene(ground, objects)


def holds(spec: Spec, drawn: scene.Scene) -> bool:
  """Whether every fact of `spec` is true of a scene: the ground truth that a judge must match."""
  if spec.ground not in (None, drawn.ground):
    return False
  if len(drawn.objects) != sum(group.count for group in spec.groups):
    return False
  members = [
    [o for o in drawn.objects if o.shape == g.shape and g.colour in (None, o.colour)]
    for g in spec.groups
  ]
  if any(len(m) != group.count for m, group in zip(members, spec.groups, strict=True)):
    return False
  if spec.relation is None:
    return True
  (first,), (second,) = members
  return related(spec.relation, first.x - second.x, first.y - second.y)


def _variants(spec: Spec) -> dict[str, list[Spec]]:
  """By kind of fact, every spec that differs from `spec` in one fact of that kind."""
  kinds = ("shape", "colour", "count", "relation", "ground")
  variants: dict[str, list[Spec]] = {kind: [] for kind in kinds}
  shapes = {group.shape for group in spec.groups}
  colours = {group.colour for group in spec.groups}
  for i, group in enumerate(spec.groups):
    change = functools.partial(dataclasses.replace, group)
    changed = {"shape": [change(shape=s) for s in scene.SHAPES if s not in shapes]}
    if group.colour is not None:
      changed["colour"] = [change(colour=c) for c in scene.COLOURS if c not in colours]
    if group.count > 1:
      changed["count"] = [change(count=n) for n in NUMBERS.values() if n != group.count]
    for kind, rows in changed.items():
      for new in rows:
        groups = (*spec.groups[:i], new, *spec.groups[i + 1 :])
        variants[kind].append(dataclasses.replace(spec, groups=groups))
  if spec.relation is not None:
    others = [r for r in RELATIONS if r != spec.relation]
    variants["relation"] = [dataclasses.replace(spec, relation=r) for r in others]
  if spec.ground is not None:
    others = [g for g in scene.GROUNDS if g != spec.ground]
    variants["ground"] = [dataclasses.replace(spec, ground=g) for g in others]
  return {kind: rows for kind, rows in variants.items() if rows}


def corrupt(rng: np.random.Generator, spec: Spec) -> Spec:
  """A spec of the same category that is wrong in exactly one fact, the kind drawn uniformly.

  No scene makes both true, so `to_text` of the result is a caption that is certainly imperfect.
  """
  variants = _variants(spec)
  rows = variants[str(rng.choice(list(variants)))]
  return rows[rng.integers(len(rows))]


@functools.cache
def _training_facts() -> frozenset[Spec]:
  return frozenset(canonical(prompt.spec) for prompt in train_prompts())


def training_caption(rng: np.random.Generator, spec: Spec, *, wrong: bool) -> Prompt:
  """What to write under a training image of `spec`: its own prompt or, if `wrong`, a near miss.

  Every caption of a training set comes from here, the wrong ones too: a model that sees a held-out
  prompt under a picture that does not show it has been taught what to get wrong when it is tested.

  Args:
    rng: draws the near miss, a result of `corrupt`.
    spec: training facts, in any wording.
    wrong: whether exactly one fact is to be wrong.

  Returns:
    A prompt of training facts, whatever their wording.

  Raises:
    ValueError: the facts of `spec` are held out.
  """
  if canonical(spec) not in _training_facts():
    raise ValueError(
      f"expected facts of the training split, found {to_text(spec)!r}, which is held out: draw "
      'specs from train_prompts() or sample_prompts(..., "train")'
    )
  found = corrupt(rng, spec) if wrong else spec
  while canonical(found) not in _training_facts():  # most are, so most tries succeed
    found = corrupt(rng, spec)
  return Prompt(to_text(found), found.category, found)
