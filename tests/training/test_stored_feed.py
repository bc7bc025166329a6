"""The feed of stored samples on a system of a few numbers: which one, its record, its label."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from jaxalign import methods
from jaxalign.data import examples as examples_lib
from jaxalign.diffusion import guidance
from jaxalign.distributed import sharding
from jaxalign.modalities.image import IMAGES
from jaxalign.modalities.trajectory import PLANS
from jaxalign.training.feeds import stored

LABELS = [1.0, 0.0, 0.5, 0.6, 0.25, 1.0]  # of the first image
PAIRS = methods.Stored(examples_lib.pairs)
KEEP_TIES = {"ties": "half"}


encoded = []  # of every call of `encode`: what its noise is a function of


def encode(frozen, images, seed, step, j):
  encoded.append((seed, step, j))
  return images[..., 0, 0, :1].astype(np.float32)


# In the place of a model: latents are an image's shade, a prompt is known by its length.
SYSTEM = types.SimpleNamespace(
  mesh=sharding.one_device(),
  frozen={},
  model=types.SimpleNamespace(
    modality=IMAGES,
    sample_shape=(4, 4, 3),
    tokenize=lambda records: np.array([[len(record["prompt"])] for record in records], np.int32),
    empty=np.zeros((1, 1), np.int32),
  ),
  encode_fn=encode,
  condition_fn=lambda frozen, ids: guidance.Guided({"text": ids}, {}),
)


@pytest.fixture
def make_feed(tmp_path):
  """Record i has the prompt of length i + 1, and images of shades 10 i and 10 i + 1."""
  lines = []
  for i, label in enumerate(LABELS):
    names = [f"{i}_{j}.png" for j in (0, 1)]
    for j, name in enumerate(names):
      Image.fromarray(np.full((4, 4, 3), 10 * i + j, np.uint8)).save(tmp_path / name)
    lines.append(json.dumps({"prompt": "x" * (i + 1), "images": names, "label_0": label}))
  (tmp_path / "pairs.jsonl").write_text("\n".join(lines))

  def make(kind=PAIRS, options=KEEP_TIES, **data):
    given = {**options, "max_bad_fraction": 0.0, "condition_dropout": 0.0, "resize": False}
    sections = {
      "seed": 3,
      "batch": {"num_examples": 6, "microbatch": 2},
      "data": {"source": str(tmp_path / "pairs.jsonl"), **given, **data},
    }
    setup = types.SimpleNamespace(sections=sections, system=SYSTEM)
    return stored.StoredExamples(setup, kind, tmp_path)

  return make


def examples(feed, step):
  """Of every example of a step: shades [2], the length of its prompt, and p."""
  drawn = feed.draw(None, step)
  (selection,) = drawn.selections
  batches = [feed.select(drawn.data, rows) for rows in selection]
  x_0, text, p = (
    np.concatenate(leaves)
    for leaves in zip(*[(b.x_0, b.cond["text"], *b.labels.values()) for b in batches], strict=True)
  )
  return x_0[..., 0], text[:, 0], p


def test_every_pair_comes_with_its_own_prompt_and_label(make_feed):
  feed = make_feed()
  for step in range(3):
    shades, lengths, p = examples(feed, step)
    assert sorted(lengths) == [1, 2, 3, 4, 5, 6]  # an epoch a step
    for pair, length, label in zip(shades, lengths, p, strict=True):
      i = int(length) - 1
      first_wins = LABELS[i] >= 0.5
      expected = [10 * i, 10 * i + 1] if first_wins else [10 * i + 1, 10 * i]
      np.testing.assert_array_equal(pair, expected)
      np.testing.assert_allclose(label, max(LABELS[i], 1 - LABELS[i]))


def test_dropped_prompts_are_empty_and_keep_their_pair_and_label(make_feed):
  plain, dropped = make_feed(), make_feed(condition_dropout=0.5)
  shares = []
  for step in range(20):
    shades, lengths, p = examples(plain, step)
    same_shades, shorter, same_p = examples(dropped, step)
    np.testing.assert_array_equal(shades, same_shades)
    np.testing.assert_array_equal(p, same_p)
    assert ((shorter == lengths) | (shorter == 0)).all()
    shares.append(np.mean(shorter == 0))
  assert 0.3 < np.mean(shares) < 0.7  # of 120 with standard deviation 0.046
  assert (examples(make_feed(condition_dropout=1.0), 0)[1] == 0).all()


def test_the_share_of_dropped_prompts_is_the_one_asked_for(make_feed):
  """A quarter: three quarters, which is what is kept, would be as far from it as can be seen."""
  feed = make_feed(condition_dropout=0.25)
  dropped = [tuple(examples(feed, step)[1] == 0) for step in range(40)]
  assert 0.15 < np.mean(dropped) < 0.35  # of 240, with standard deviation 0.028
  assert len(set(dropped)) > 5  # other ones in other iterations
  assert [tuple(examples(feed, step)[1] == 0) for step in range(3)] == dropped[:3]
  assert (examples(make_feed(), 0)[1] > 0).all()


def test_every_microbatch_is_encoded_with_noise_of_its_own(make_feed):
  feed = make_feed()
  encoded.clear()
  for step in (0, 1):
    feed.draw(None, step)
  assert encoded == [(3, step, j) for step in (0, 1) for j in (0, 1, 2)]


def test_a_loss_without_soft_labels_refuses_ties(make_feed):
  hard = methods.Stored(examples_lib.choices)
  with pytest.raises(ValueError, match=r'data\.ties: expected "drop", because the loss'):
    make_feed(hard)
  assert len(make_feed(hard, {"ties": "drop"}).examples) == 5


def test_thumbs_are_samples_by_themselves_good_or_bad(make_feed):
  """Of a vote the more frequent choice is good and the other bad; of a tie nothing is known."""
  feed = make_feed(methods.Stored(examples_lib.thumbs), {"threshold": 0.5})
  assert feed.example == "sample" and feed.num_samples == 6
  seen = set()
  for step in range(12):
    for shade, length, good in zip(*examples(feed, step), strict=True):
      i, first = int(length) - 1, shade % 10 == 0
      assert shade // 10 == i and i != 2  # the tie
      assert good == (first == (LABELS[i] > 0.5))
      seen.add(float(shade))
  assert len(seen) == 10  # both of all five


@pytest.fixture
def plans_feed(tmp_path):
  """Thumbs on plans `[4, 2]`: record i starts at (i / 10, 0), its plans are full of 10 i + j."""
  lines = []
  for i, good in enumerate([(1, 0), (0, 1), (1, -1)]):
    plans = np.stack([np.full((4, 2), 10 * i + j, np.float32) for j in (0, 1)])
    (tmp_path / str(i)).mkdir()
    names = [f"{i}/{path.name}" for path in PLANS.write(plans, tmp_path / str(i))]
    record = {"start": [i / 10, 0], "goal": [0.9, 0]}
    lines.append(json.dumps({"record": record, "samples": names, "binary": good}))
  (tmp_path / "thumbs.jsonl").write_text("\n".join(lines))
  model = types.SimpleNamespace(
    modality=PLANS,
    sample_shape=(4, 2),
    tokenize=lambda records: np.float32([record["start"] for record in records]),
    empty=np.zeros((1, 2), np.float32),
  )
  changed = {"model": model, "encode_fn": lambda frozen, plans, seed, step, j: plans[..., 0, :1]}
  system = types.SimpleNamespace(**{**vars(SYSTEM), **changed})
  sections = {
    "seed": 3,
    "batch": {"num_examples": 6, "microbatch": 3},
    "data": {
      "source": str(tmp_path / "thumbs.jsonl"), "threshold": 0.5, "max_bad_fraction": 0.0,
      "condition_dropout": 0.0, "resize": False,
    },
  }  # fmt: skip
  setup = types.SimpleNamespace(sections=sections, system=system)
  return stored.StoredExamples(setup, methods.Stored(examples_lib.thumbs), tmp_path)


def test_plans_come_with_their_own_record_and_label(plans_feed):
  assert plans_feed.unit == "plans" and plans_feed.example == "sample"
  seen = set()
  for step in range(8):
    for value, start, good in zip(*examples(plans_feed, step), strict=True):
      i, j = divmod(int(value), 10)
      assert start == np.float32(i / 10)
      assert good == {(0, 0): 1, (0, 1): 0, (1, 0): 0, (1, 1): 1, (2, 0): 1}[i, j]
      seen.add((i, j))
  assert len(seen) == 5
  drawn, (shapes, _) = plans_feed.draw(None, 0).data, plans_feed.shapes(None)
  assert drawn.x_0.shape == shapes.x_0.shape and drawn.x_0.dtype == shapes.x_0.dtype


def test_options_are_those_of_the_kind_of_examples(make_feed):
  with pytest.raises(ValueError, match=r"config\.data: .*'threshold'; valid keys: ties"):
    make_feed(PAIRS, {"ties": "drop", "threshold": 0.5})
  with pytest.raises(ValueError, match=r"config\.data: missing a required .*'threshold'"):
    make_feed(methods.Stored(examples_lib.thumbs), {})


def test_shapes_are_those_of_a_draw(make_feed):
  feed = make_feed()
  shapes, _ = feed.shapes(None)
  drawn = feed.draw(None, 0)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
    lambda x: (x.shape, x.dtype), drawn.data
  )
