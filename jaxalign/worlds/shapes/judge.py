"""Decides which facts of a prompt hold in an image, without any learned part.

Error rates, measured on 1500 scenes of training and held-out prompts in equal shares. "Missed" is
the share of true images not judged correct. Of 750 of the same images shown with a caption wrong
in one fact, none was accepted under any disturbance.

  disturbance                                   missed
  none                                          0.0 %
  Gaussian blur, sigma 0.7 pixels               0.0 %
  Gaussian blur, sigma 1.0 pixels               0.0 %
  pixel noise, standard deviation 0.05          0.0 %
  pixel noise, standard deviation 0.08          0.0 %
  offset of +0.08 or -0.08 of every channel     0.0 %
  JPEG, quality 60, chroma halved               1.3 %  (mostly small rings, whose colour bleeds)

Half shapes, shapes of half the size, shapes faded halfway to the ground, and blank, noisy, averaged
or striped images score 0.
"""

import dataclasses
import itertools

import numpy as np

from jaxalign.worlds.shapes import detection, prompts, scene

MAX_UNEXPLAINED = 8  # pixels of 4096
# An object smaller than this share of the smallest one drawn is half of a larger one.
SIZE_SLACK = 0.85


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Which facts hold; `score` is their mean in [0, 1], `correct` says that all hold.

  Facts, each present only when the prompt speaks of it: `object_1`, `object_2` (a well-formed
  object of the shape), `colour_1`, `colour_2` (that object has the colour), `count`, `relation`,
  `ground`, and always `nothing_else`.
  """

  facts: dict[str, bool]
  score: float
  correct: bool


def _as_float(image: np.ndarray) -> np.ndarray:
  """The image as float32 `[64, 64, 3]` in [0, 1], whatever of the two accepted forms it had."""
  image = np.asarray(image)
  expected = (scene.IMAGE_SIZE, scene.IMAGE_SIZE, 3)
  if image.shape != expected:
    raise ValueError(f"expected an image {list(expected)}, got {list(image.shape)}")
  if image.dtype == np.uint8:
    return image.astype(np.float32) / 255
  image = image.astype(np.float32)
  low, high = image.min(), image.max()
  if not (low >= -0.5 and high <= 1.5):  # written so that NaN fails it too
    raise ValueError(
      f"expected a uint8 image or a finite float one in [0, 1], got values from {low} to {high}:"
      " rescale it"
    )
  return image.clip(0, 1)


def _assign(groups: tuple, objects: tuple) -> tuple:
  """One object, or None, per group of a single object, such that most facts hold."""
  candidates = (*objects, *[None] * len(groups))

  def matches(chosen: tuple) -> tuple[int, int]:
    pairs = [(g, o) for g, o in zip(groups, chosen, strict=True) if o is not None]
    shapes = sum(g.shape == o.shape for g, o in pairs)
    colours = sum(g.colour == o.colour for g, o in pairs)
    return shapes + colours, shapes

  return max(itertools.permutations(candidates, len(groups)), key=matches)


def _named_facts(spec: prompts.Spec, objects: tuple) -> tuple[dict[str, bool], bool]:
  """(facts about the objects the prompt names, whether every object is one of them)."""
  if spec.category == "counting":
    (group,) = spec.groups
    alike = sum(o.shape == group.shape for o in objects)
    facts = {"object_1": alike > 0, "count": alike == group.count}
    return facts, alike == len(objects)
  facts = {}
  chosen = _assign(spec.groups, objects)
  for i, (group, item) in enumerate(zip(spec.groups, chosen, strict=True), 1):
    facts[f"object_{i}"] = item is not None and item.shape == group.shape
    if group.colour is not None:
      facts[f"colour_{i}"] = item is not None and item.colour == group.colour
  present = sum(facts[f"object_{i}"] for i in range(1, len(chosen) + 1))
  if spec.relation is not None:
    facts["relation"] = present == 2 and prompts.related(
      spec.relation, chosen[0].x - chosen[1].x, chosen[0].y - chosen[1].y
    )
  return facts, present == len(objects)


def judge(image: np.ndarray, prompt: str | prompts.Spec) -> Verdict:
  """Judges one image.

  The score is exactly 0 unless the image has a well-formed object of an asked shape or colour:
  `nothing_else` and `ground` hold only in company of one.

  Args:
    image: `[64, 64, 3]`, uint8 or float in [0, 1].
    prompt: text of the grammar, or what it parses to.
  """
  spec = prompts.parse(prompt) if isinstance(prompt, str) else prompt
  seen = detection.detect(_as_float(image))
  smallest = prompts.COUNTED_SIZES if spec.category == "counting" else prompts.SIZES[1]
  objects = tuple(o for o in seen.objects if o.size >= SIZE_SLACK * smallest[0])
  facts, only_named = _named_facts(spec, objects)
  any_named = any(facts.values())
  clean = seen.unexplained <= MAX_UNEXPLAINED and len(objects) == len(seen.objects)
  facts["nothing_else"] = any_named and only_named and clean
  if spec.ground is not None:
    facts["ground"] = any_named and seen.ground == spec.ground
  return Verdict(facts, sum(facts.values()) / len(facts), all(facts.values()))
