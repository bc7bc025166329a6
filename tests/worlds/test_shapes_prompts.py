"""The grammar, the split, and that a sampled scene tells the truth."""

import collections
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from jaxalign.worlds.shapes import prompts, scene

TRAIN, HELD_OUT = prompts.train_prompts(), prompts.held_out_prompts()
EVERY = TRAIN + HELD_OUT


def test_there_are_as_many_prompts_as_combinations():
  # 5 shapes, 6 colours, 5 grounds, 3 numbers, 4 relations; pairs are ordered and differ.
  counts = collections.Counter(p.category for p in EVERY)
  assert counts == {
    "single_object": 25,
    "colours": 30,
    "two_objects": 20,
    "counting": 15,
    "position": 80,
    "colour_attribution": 600,
  }
  assert len({p.text for p in EVERY}) == len(EVERY)


def test_every_prompt_parses_to_its_spec_and_back():
  for prompt in EVERY:
    assert prompts.parse(prompt.text) == prompt.spec
    assert prompts.to_text(prompt.spec) == prompt.text
    assert prompt.spec.category == prompt.category
    assert prompt.text == prompt.text.lower()
    assert len(prompt.text.split()) <= 12


@pytest.mark.parametrize(
  ("text", "groups", "relation", "ground"),
  [
    ("a circle on a grey ground", [("circle", None, 1)], None, "grey"),
    ("an orange ring", [("ring", "orange", 1)], None, None),
    ("three crosses", [("cross", None, 3)], None, None),
    ("a  Circle left of a square", [("circle", None, 1), ("square", None, 1)], "left of", None),
    (
      "a red circle and a blue square",
      [("circle", "red", 1), ("square", "blue", 1)],
      None,
      None,
    ),
  ],
)
def test_parse_by_hand(text, groups, relation, ground):
  spec = prompts.parse(text)
  assert [dataclasses.astuple(group) for group in spec.groups] == groups
  assert (spec.relation, spec.ground) == (relation, ground)


@pytest.mark.parametrize(
  "text",
  ["", "circle", "a pink circle", "five circles", "a circle and a circle", "a red circle a square"],
)
def test_parse_names_the_grammar_when_it_refuses(text):
  with pytest.raises(ValueError, match=r"(?s)single_object.*RELATION: left of"):
    prompts.parse(text)


def test_split_is_disjoint_for_wordings_of_the_same_facts():
  train = {prompts.canonical(p.spec) for p in TRAIN}
  held_out = {prompts.canonical(p.spec) for p in HELD_OUT}
  assert not train & held_out
  for first, second in [
    ("a red circle and a blue square", "a blue square and a red circle"),
    ("a circle left of a square", "a square right of a circle"),
    ("a ring above a cross", "a cross below a ring"),
  ]:
    assert prompts.canonical(prompts.parse(first)) == prompts.canonical(prompts.parse(second))
  unequal = prompts.parse("a circle left of a square"), prompts.parse("a square left of a circle")
  assert prompts.canonical(unequal[0]) != prompts.canonical(unequal[1])


def test_split_share_and_words_per_category():
  for category in prompts.CATEGORIES:
    train = [p for p in TRAIN if p.category == category]
    held_out = [p for p in HELD_OUT if p.category == category]
    assert 0.19 <= len(held_out) / (len(train) + len(held_out)) <= 0.25
    words = {word for p in train for word in p.text.split()}
    assert {word for p in held_out for word in p.text.split()} <= words


def test_validation_and_test_share_no_facts_and_have_every_category():
  validation, test = prompts.validation_prompts(), prompts.test_prompts()
  assert {p.text for p in (*validation, *test)} == {p.text for p in HELD_OUT}
  assert len(validation) + len(test) == len(HELD_OUT)
  sides = [{prompts.canonical(p.spec) for p in side} for side in (validation, test)]
  assert not sides[0] & sides[1]
  for category in prompts.CATEGORIES:
    facts = [sum(spec.category == category for spec in side) for side in sides]
    assert 1 <= facts[0] <= facts[1]
  # What has been reported must stay apart from what was tuned on, in every version.
  assert (len(validation), len(test)) == (57, 113)
  digest = hashlib.sha256("\n".join(p.text for p in validation).encode()).hexdigest()
  assert digest.startswith("c9869fbd17daad8c")


def test_split_never_changes():
  # What was trained on one side must not be tested on it by a later version.
  assert "three rings" in {p.text for p in HELD_OUT}
  assert "a red circle" in {p.text for p in HELD_OUT}
  assert "three circles" in {p.text for p in TRAIN}
  assert len(HELD_OUT) == 170


def test_sample_prompts_is_balanced_and_deterministic():
  sampled = prompts.sample_prompts(5, 61, "held_out")
  assert sampled == prompts.sample_prompts(5, 61, "held_out")
  assert sampled != prompts.sample_prompts(6, 61, "held_out")
  assert set(sampled) <= set(HELD_OUT)
  counts = collections.Counter(p.category for p in sampled)
  assert sorted(counts.values()) == [10, 10, 10, 10, 10, 11]
  with pytest.raises(ValueError, match="held_out"):
    prompts.sample_prompts(0, 1, "test")


def test_relations_exclude_each_other():
  rng = np.random.default_rng(0)
  for dx, dy in rng.uniform(-20, 20, (200, 2)):
    assert sum(prompts.related(r, dx, dy) for r in prompts.RELATIONS) == 1
    for relation, opposite in prompts.OPPOSITES.items():
      assert prompts.related(relation, dx, dy) == prompts.related(opposite, -dx, -dy)
  assert prompts.related("above", 1.0, -5.0)  # y points down
  assert prompts.related("left of", -5.0, 1.0)


def test_sampled_scenes_are_true_inside_and_apart():
  rng = np.random.default_rng(1)
  for prompt in prompts.sample_prompts(2, 600) + prompts.sample_prompts(3, 300, "held_out"):
    drawn = prompts.sample_scene(rng, prompt.spec)
    assert prompts.holds(prompt.spec, drawn)
    for item in drawn.objects:
      for centre in (item.x, item.y):
        assert item.size / 2 + 1 <= centre <= 63 - item.size / 2
      assert 14 <= item.size <= (18 if prompt.category == "counting" else 26)
    for first, second in itertools.combinations(drawn.objects, 2):
      assert scene.apart(first, second) >= prompts.MIN_GAP


def test_what_a_prompt_leaves_open_varies():
  rng = np.random.default_rng(2)
  scenes = [prompts.sample_scene(rng, prompts.parse("two circles")) for _ in range(300)]
  assert {s.ground for s in scenes} == set(scene.GROUNDS)
  assert {o.colour for s in scenes for o in s.objects} == set(scene.COLOURS)
  assert any(s.objects[0].colour != s.objects[1].colour for s in scenes)


def test_holds_by_hand():
  circle = scene.Object("circle", "red", 12, 30, 20)
  square = scene.Object("square", "blue", 45, 33, 20)
  drawn = scene.Scene("grey", (circle, square))
  for text in [
    "a circle and a square",
    "a square right of a circle",
    "a blue square and a red circle",
  ]:
    assert prompts.holds(prompts.parse(text), drawn)
  for text in [
    "a circle right of a square",
    "a circle above a square",
    "a red square and a blue circle",
    "a red circle",
    "a circle on a grey ground",
    "two circles",
    "a circle and a ring",
  ]:
    assert not prompts.holds(prompts.parse(text), drawn)


def _changes(spec: prompts.Spec, other: prompts.Spec) -> int:
  pairs = zip(spec.groups, other.groups, strict=True)
  fields = [
    (dataclasses.astuple(first), dataclasses.astuple(second)) for first, second in pairs
  ] + [((spec.relation, spec.ground), (other.relation, other.ground))]
  return sum(a != b for first, second in fields for a, b in zip(first, second, strict=True))


def test_corrupt_changes_one_fact_and_the_truth():
  rng = np.random.default_rng(4)
  for prompt in EVERY:
    other = prompts.corrupt(rng, prompt.spec)
    assert _changes(prompt.spec, other) == 1
    assert prompts.parse(prompts.to_text(other)) == other
    assert not prompts.holds(prompt.spec, prompts.sample_scene(rng, other))


@pytest.mark.parametrize(
  ("text", "kinds"),
  [
    ("a circle on a grey ground", 4 + 4),
    ("a red circle", 4 + 5),
    ("a circle and a square", 3 + 3),
    ("two circles", 4 + 2),
    ("a circle left of a square", 3 + 3 + 3),
    ("a red circle and a blue square", 3 + 3 + 4 + 4),
  ],
)
def test_corrupt_reaches_every_variant(text, kinds):
  rng = np.random.default_rng(5)
  spec = prompts.parse(text)
  assert len({prompts.corrupt(rng, spec) for _ in range(400)}) == kinds


def test_a_training_caption_is_never_held_out():
  """From every training prompt, right or wrong, and in no wording of a held-out one."""
  rng = np.random.default_rng(6)
  held_out = {prompts.canonical(p.spec) for p in HELD_OUT}
  corrupted = []
  for prompt in TRAIN:
    assert prompts.training_caption(rng, prompt.spec, wrong=False) == prompt
    for _ in range(10):
      wrong = prompts.training_caption(rng, prompt.spec, wrong=True)
      assert wrong in TRAIN and prompts.canonical(wrong.spec) not in held_out
      assert _changes(prompt.spec, wrong.spec) == 1
      corrupted.append(prompts.canonical(prompts.corrupt(rng, prompt.spec)) in held_out)
  assert np.mean(corrupted) > 0.1  # so that the test above can fail


@pytest.mark.parametrize("wrong", [False, True])
def test_a_caption_of_held_out_facts_is_refused_in_any_wording(wrong):
  first, second = next(p for p in HELD_OUT if p.category == "two_objects").spec.groups
  for groups in ((first, second), (second, first)):
    spec = prompts.Spec("two_objects", groups)
    with pytest.raises(ValueError, match=f"found '{prompts.to_text(spec)}', which is held out"):
      prompts.training_caption(np.random.default_rng(0), spec, wrong=wrong)
