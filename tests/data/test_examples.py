"""Examples in batches: a pure function of seed and step, one of each record once an epoch."""

import collections
import functools

import numpy as np
import pytest
from PIL import Image
from preference_records import BLUE, RED, encode, record, solid

from jaxalign.data import example_set, examples, preferences
from jaxalign.data.preferences import make_candidate
from jaxalign.modalities.image import IMAGES
from jaxalign.modalities.trajectory import PLANS


def pairs_of(records, ties="drop", **options):
  of_record = functools.partial(examples.pairs, ties=ties)
  return example_set.ExampleSet(records, of_record, IMAGES, shape=(4, 6, 3), **options)


def make_pairs(num_records, **options):
  """One pair a record, in which the second image of even records won."""
  ranks = ([2, 1], [1, 2])
  records = [record(prompt=f"p{i}", rank=ranks[i % 2]) for i in range(num_records)]
  return pairs_of(records, **options)


def test_pairs_of_all_records_with_the_winner_first():
  records = [
    record(prompt="a", rank=[2, 3, 1]),
    record(prompt="b", prob=[[np.nan, 0.5], [0.5, np.nan]]),
    record(prompt="c", prob=[[np.nan, 0.25], [0.75, np.nan]]),
  ]
  pairs = pairs_of(records)
  assert [r["prompt"] for r in pairs.records] == ["a", "a", "a", "c"] and len(pairs) == 4
  np.testing.assert_allclose(pairs.values["p"], [1, 1, 1, 0.75])
  assert pairs.record.tolist() == [0, 0, 0, 1] and pairs.num_records == 2  # that of "b" is none
  images = pairs.samples(np.array([3, 0, 1, 2, 3], np.int32))
  assert images.shape == (5, 2, 4, 6, 3) and images.dtype == np.uint8
  # The grey of an image is its index.
  assert images[:, :, 0, 0, 0].tolist() == [[1, 0], [0, 1], [2, 0], [2, 1], [1, 0]]
  with_ties = pairs_of(records, ties="half")
  assert [r["prompt"] for r in with_ties.records] == ["a", "a", "a", "b", "c"]
  assert with_ties.values["p"][3] == 0.5


def test_records_without_any_pair_are_an_error():
  with pytest.raises(ValueError, match='none of 1 records makes one'):
    pairs_of([record(rank=[1, 1])])


def test_images_of_another_size_are_refused_or_resized(tmp_path):
  small = make_candidate(solid(RED), IMAGES.read)
  large = make_candidate(solid(BLUE, (8, 8)), IMAGES.read)
  label = preferences.Record({"prompt": "a"}, (small, large), rank=np.array([1.0, 2.0]))
  with pytest.raises(
    ValueError, match=r"\(4, 6, 3\), found one of \(8, 8, 3\); .*--config\.data\.resize=crop"
  ):
    pairs_of([label])
  pairs = pairs_of([label], resize=True)
  images = pairs.samples(np.array([0]))
  assert images.shape == (1, 2, 4, 6, 3)
  assert (images[0, 0] == RED).all() and (images[0, 1] == BLUE).all()


def test_how_images_are_resized_is_named():
  wide = Image.new("RGB", (12, 4), RED)
  wide.paste(BLUE, (3, 0, 9, 4))  # the 6 columns in the middle
  made = make_candidate(encode(wide), IMAGES.read)
  label = preferences.Record({"prompt": "a"}, (made, made), rank=np.array([1.0, 2.0]))
  for name in ("crop", True):
    assert (pairs_of([label], resize=name).samples(np.array([0])) == BLUE).all()
  squeezed = pairs_of([label], resize="squeeze").samples(np.array([0]))
  assert tuple(squeezed[0, 0, 0, 0]) == RED and tuple(squeezed[0, 0, 0, 3]) == BLUE
  for name in ("corp", 3, ["crop"]):
    with pytest.raises(ValueError, match=r"data\.resize: expected False or one of crop, squeeze"):
      pairs_of([label], resize=name)


def test_an_image_that_changed_after_reading_is_noticed(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(solid(RED))
  candidates = (make_candidate(path, IMAGES.read),) * 2
  label = preferences.Record({"prompt": "a"}, candidates, scores=np.array([1.0, 2.0]))
  pairs = pairs_of([label])
  path.write_bytes(solid(RED, (4, 7)))
  with pytest.raises(ValueError, match=r"found one of \(4, 7, 3\)"):
    pairs.samples(np.array([0]))
  path.unlink()
  with pytest.raises(ValueError, match=r"unreadable image.*a\.png"):
    pairs.samples(np.array([0]))


def test_plans_are_read_as_images_are_and_never_resized(tmp_path):
  short, long = (np.full((h, 2), h, np.float32) for h in (3, 4))
  path, other = PLANS.write(np.stack([long, -long]), tmp_path)
  candidates = tuple(make_candidate(source, PLANS.read) for source in (path, other.read_bytes()))
  asked = {"start": [0, 0], "goal": [1, 1]}
  label = preferences.Record(asked, candidates, rank=np.array([2.0, 1.0]))
  of_record = functools.partial(examples.pairs, ties="drop")
  pairs = example_set.ExampleSet([label], of_record, PLANS, shape=(4, 2))
  assert pairs.records == [asked] and pairs.dtype == np.float32
  np.testing.assert_array_equal(pairs.samples(np.array([0, 0])), [[-long, long]] * 2)
  np.save(path, short)
  with pytest.raises(ValueError, match=r"plans of shape \(4, 2\), found one of \(3, 2\)$"):
    pairs.samples(np.array([0]))
  with pytest.raises(ValueError, match=r"plans of shape \(5, 2\), found one of \(4, 2\)$"):
    example_set.ExampleSet([label], of_record, PLANS, shape=(5, 2))
  with pytest.raises(ValueError, match="resize: expected False, because plans cannot be resized"):
    example_set.ExampleSet([label], of_record, PLANS, shape=(4, 2), resize=True)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, 25])
def test_every_epoch_shows_every_record_once(batch_size):
  pairs = make_pairs(10)
  steps = 60 // batch_size + 1
  rows = np.concatenate([pairs.draw_for_step(0, step, batch_size) for step in range(steps)])
  assert rows.dtype == np.int32 and len(rows) == steps * batch_size
  epochs = rows[:60].reshape(6, 10)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6  # each in another order


def test_a_ranking_counts_as_one_record_and_its_pairs_alike():
  """20 records of nine ranked images, 36 pairs each, and 20 of two images."""
  ranks = [range(1, 10), [1, 2]] * 20
  records = [record(prompt=f"p{i}", rank=rank) for i, rank in enumerate(ranks)]
  pairs = pairs_of(records)
  assert len(pairs) == 20 * 36 + 20 and pairs.num_records == 40
  seen = np.zeros(len(pairs), int)
  for epoch in range(1800):
    rows = pairs.draw_for_step(1, epoch, 40)
    assert sorted(pairs.record[rows]) == list(range(40))
    seen[rows] += 1
  counts = np.array([36, 1])[np.arange(40) % 2][pairs.record]
  np.testing.assert_array_equal(seen[counts == 1], 1800)
  # A pair of a ranking comes with probability 1 / 36: expected 50, standard deviation 7.
  drawn = seen[counts == 36]
  assert abs(drawn - 50).max() < 5 * 7 and 6 < drawn.std() < 8


def test_the_pair_of_a_record_changes_with_the_epoch_and_not_with_the_batch():
  records = [record(rank=range(1, 8)) for _ in range(6)]
  pairs = pairs_of(records)
  whole = np.concatenate([pairs.draw_for_step(0, step, 6) for step in range(4)])
  cut = np.concatenate([pairs.draw_for_step(0, step, 4) for step in range(6)])
  np.testing.assert_array_equal(whole, cut)
  chosen = np.stack([epoch[np.argsort(pairs.record[epoch])] for epoch in whole.reshape(4, 6)])
  assert (chosen[1:] != chosen[0]).mean() > 0.5


def test_a_draw_is_a_function_of_seed_and_step():
  pairs = make_pairs(40)
  late = pairs.draw_for_step(3, 7, 16)  # asked for first, so nothing earlier can matter
  first = pairs.draw_for_step(3, 0, 16)
  np.testing.assert_array_equal(make_pairs(40).draw_for_step(3, 7, 16), late)
  np.testing.assert_array_equal(pairs.draw_for_step(3, 0, 16), first)
  for seed, step in ((3, 1), (4, 0)):
    assert (pairs.draw_for_step(seed, step, 16) != first).mean() > 0.5


@pytest.mark.parametrize("arguments", [(0, -1, 4), (0, 0, 0)])
def test_a_draw_that_cannot_be(arguments):
  with pytest.raises(ValueError, match=r"expected step"):
    make_pairs(4).draw_for_step(*arguments)


def test_the_order_of_an_epoch_is_not_biased():
  pairs = make_pairs(4)
  firsts = collections.Counter(int(pairs.draw_for_step(0, 4 * e, 1)[0]) for e in range(800))
  # Each leads with probability 1/4: expected 200, standard deviation sqrt(800 * 3) / 4 = 12.2.
  assert all(abs(firsts[row] - 200) < 5 * 12.2 for row in range(4))


def test_thumbs_are_candidates_by_themselves():
  """What a label leaves open is no example; a threshold is in the label's own unit."""
  records = [
    record(prompt="a", binary=[1, -1, 0]),
    record(prompt="b", scores=[0.2, 0.9, 0.5]),
    record(prompt="c", prob=[[np.nan, 0.5], [0.5, np.nan]]),
  ]
  of_record = functools.partial(examples.thumbs, threshold=0.5)
  found = example_set.ExampleSet(records, of_record, IMAGES, shape=(4, 6, 3))
  assert found.each == () and [r["prompt"] for r in found.records] == ["a", "a", "b", "b", "b"]
  assert found.values["good"].tolist() == [1, 0, 0, 1, 1] and found.num_records == 2
  images = found.samples(np.array([1, 4]))
  assert images.shape == (2, 4, 6, 3) and images[:, 0, 0, 0].tolist() == [2, 2]
