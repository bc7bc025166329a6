"""Preference records: labels to pairs and rankings, and odd images."""


import numpy as np
import pytest
from PIL import Image
from preference_records import BLUE, GREEN, NOISE, RED, encode, record

from jaxalign.data import preferences
from jaxalign.modalities.image import IMAGES

NAN = np.nan


def comparisons(label, ties="drop"):
  """{(winner, loser): p} of a label."""
  pairs = preferences.to_pairs(label, ties)
  assert pairs.winner.dtype == pairs.loser.dtype == np.int32
  assert pairs.p.dtype == np.float32
  keys = zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True)
  return dict(zip(keys, pairs.p.tolist(), strict=True))


# ---- labels to pairs


def test_a_choice_between_two():
  assert comparisons(record(prob=[[NAN, 1], [0, NAN]])) == {(0, 1): 1.0}
  assert comparisons(record(prob=[[NAN, 0], [1, NAN]])) == {(1, 0): 1.0}
  assert comparisons(record(prob=[[NAN, 0.25], [0.75, NAN]])) == {(1, 0): 0.75}


def test_a_tie_is_dropped_or_kept_as_a_half():
  tie = record(prob=[[NAN, 0.5], [0.5, NAN]])
  assert comparisons(tie) == {}
  assert comparisons(tie, "half") == {(0, 1): 0.5}


def test_half_a_matrix_is_enough_and_its_diagonal_is_not_read():
  # The second of three was chosen: only the winner's row is filled in.
  chosen = record(prob=[[0.5, NAN, NAN], [1, 0.5, 1], [NAN, NAN, 0.5]])
  assert comparisons(chosen, "half") == {(1, 0): 1.0, (1, 2): 1.0}


def test_ranks_with_a_tie_a_gap_and_an_unknown():
  ranked = record(rank=[2, 5, 2, NAN])
  assert comparisons(ranked) == {(0, 1): 1.0, (2, 1): 1.0}
  assert comparisons(ranked, "half") == {(0, 1): 1.0, (2, 1): 1.0, (0, 2): 0.5}


def test_scores_are_higher_the_better():
  assert comparisons(record(scores=[0.1, -3, 0.1, NAN])) == {(0, 1): 1.0, (2, 1): 1.0}
  assert (0, 2) in comparisons(record(scores=[0.1, -3, 0.1, NAN]), "half")


def test_two_good_images_are_not_compared_and_so_no_tie():
  label = record(binary=[1, 1, 0, -1, 0])
  expected = {(0, 2): 1.0, (0, 4): 1.0, (1, 2): 1.0, (1, 4): 1.0}
  assert comparisons(label) == comparisons(label, "half") == expected


@pytest.mark.parametrize("ties, num_pairs", [("drop", 35), ("half", 36)])
def test_nine_ranked_images_are_36_pairs(ties, num_pairs):
  assert len(comparisons(record(rank=[1, 1, 3, 4, 5, 6, 7, 8, 9]), ties)) == num_pairs


def test_a_record_without_a_comparison_has_no_pairs():
  assert comparisons(record(scores=[1])) == comparisons(record(rank=[1, NAN]), "half") == {}


def test_an_unknown_tie_policy_is_refused():
  with pytest.raises(ValueError, match='"drop" or "half", got "keep"'):
    preferences.to_pairs(record(rank=[1, 2]), "keep")


# ---- labels to rankings and to good and bad


@pytest.mark.parametrize(
  "label, expected",
  [
    ({"rank": [3, 7, 3, NAN]}, [1, 3, 1, NAN]),
    ({"scores": [0.5, NAN, 2.0, 0.5]}, [2, NAN, 1, 2]),
    ({"binary": [0, 1, -1, 1]}, [3, 1, NAN, 1]),
    ({"prob": [[NAN, 0.2], [0.8, NAN]]}, [2, 1]),
    ({"prob": [[NAN, 0.5], [0.5, NAN]]}, [1, 1]),
    # Means of the rows: (0.9 + 0.6) / 2, (0.1 + 0.3) / 2, (0.4 + 0.7) / 2, none.
    ({"prob": [[NAN, 0.9, 0.6, NAN], [NAN, NAN, 0.3, NAN], [NAN] * 4, [NAN] * 4]}, [1, 3, 2, NAN]),
    # Each beats the next with 0.7: the means are all one half, whatever the rounding of 1 - 0.7.
    ({"prob": [[NAN, 0.7, 0.3], [0.3, NAN, 0.7], [0.7, 0.3, NAN]]}, [1, 1, 1]),
  ],
)
def test_rankings(label, expected):
  actual = preferences.to_ranking(record(**label))
  np.testing.assert_array_equal(actual, expected)
  assert actual.dtype == np.float32


@pytest.mark.parametrize(
  "label, threshold, expected",
  [
    ({"scores": [3, 4, 5, NAN]}, 4, [0, 1, 1, -1]),
    ({"rank": [1, 2, 3, NAN]}, 2, [1, 1, 0, -1]),
    ({"binary": [1, 0, -1]}, None, [1, 0, -1]),
    ({"prob": [[NAN, 1], [0, NAN]]}, 0.5, [1, 0]),
    ({"prob": [[NAN, 0.5], [0.5, NAN]]}, 0.5, [-1, -1]),
    ({"prob": [[NAN, 1, NAN], [NAN] * 3, [NAN] * 3]}, 0.5, [1, 0, -1]),
  ],
)
def test_good_and_bad(label, threshold, expected):
  actual = preferences.to_binary(record(**label), threshold)
  np.testing.assert_array_equal(actual, expected)
  assert actual.dtype == np.int8


def test_a_threshold_is_needed_where_the_label_is_not_binary():
  with pytest.raises(ValueError, match="expected a threshold"):
    preferences.to_binary(record(scores=[1, 2]))


def test_pairs_made_from_a_ranking_rank_the_same():
  rng = np.random.default_rng(0)
  for _ in range(20):
    ranked = record(rank=rng.integers(1, 5, 6))
    matrix = np.full((6, 6), NAN)
    for (winner, loser), p in comparisons(ranked, "half").items():
      matrix[winner, loser] = p
    np.testing.assert_array_equal(
      preferences.to_ranking(record(prob=matrix)), preferences.to_ranking(ranked)
    )


# ---- labels that cannot be


BAD_LABELS = [
  ({"rank": [1, 2, 3]}, "rank: expected [2] for 2 candidates, got [3]"),
  ({"prob": [0.5, 0.5]}, "prob: expected [2, 2]"),
  ({"prob": [[NAN, 1.5], [NAN, NAN]]}, "prob: expected numbers from 0 to 1, got 1.5"),
  ({"prob": [[NAN, 1], [1, NAN]]}, "prob[i][j] + prob[j][i] to be 1"),
  ({"prob": [[0.5, NAN], [NAN, 0.5]]}, "only unknown ones"),
  ({"rank": [0, 1]}, "rank: expected numbers from 1, the best, up, got 0"),
  ({"rank": [NAN, NAN]}, "only unknown ones"),
  ({"binary": [1, 2]}, "binary: expected 1 good, 0 bad or -1 unknown, got 2"),
  ({"binary": [-1, -1]}, "only unknown ones"),
  ({"binary": [NAN, 1]}, "got nan"),
  ({"scores": [np.inf, 1]}, "scores: expected finite numbers, got inf"),
  ({}, "expected one label of prob, rank, binary, scores, got none"),
  ({"rank": [1, 2], "scores": [1, 2]}, "got rank and scores"),
]


@pytest.mark.parametrize("labels, expected", BAD_LABELS)
def test_a_record_refuses_a_label_that_does_not_fit(labels, expected):
  with pytest.raises(ValueError) as caught:
    record(n=2, **labels)
  assert expected in str(caught.value)


def test_a_record_needs_a_prompt_and_samples():
  with pytest.raises(ValueError, match='expected "prompt" to be a text'):
    record(prompt=" ", rank=[1, 2])
  with pytest.raises(ValueError, match="at least one candidate"):
    record(n=0, rank=[])


def test_a_share_of_votes_may_be_rounded():
  assert comparisons(record(prob=[[NAN, 0.667], [0.334, NAN]])).keys() == {(0, 1)}


# ---- odd images


def corners(image, **options):
  """The upper left and the lower right pixel of what `read` makes of an image."""
  pixels = IMAGES.read(encode(image, **options))
  assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
  return tuple(pixels[0, 0].tolist()), tuple(pixels[-1, -1].tolist())


def test_greyscale_and_black_and_white():
  assert corners(Image.new("L", (5, 4), 77)) == ((77,) * 3,) * 2
  assert corners(Image.new("1", (5, 4), 1)) == ((255,) * 3,) * 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(kind):
  values = np.array([[0, 257], [32896, 65535]], np.uint16)  # 257 i is i / 255 of the range
  pixels = IMAGES.read(encode(Image.fromarray(values), kind))
  np.testing.assert_array_equal(pixels[..., 0], [[0, 1], [128, 255]])
  assert (pixels == pixels[..., :1]).all()


def test_transparent_pixels_show_white():
  image = Image.new("RGBA", (2, 1), (*RED, 255))
  image.putpixel((1, 0), (*RED, 0))
  assert corners(image) == (RED, (255, 255, 255))
  image.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black
  assert corners(image)[1] == (204, 204, 204)
  grey = Image.new("LA", (1, 1), (10, 0))
  assert corners(grey)[0] == (255, 255, 255)


def test_palettes_with_and_without_a_transparent_colour():
  image = Image.new("P", (2, 1))
  image.putpalette([*RED, *BLUE])
  image.putpixel((1, 0), 1)
  assert corners(image) == (RED, BLUE)
  assert corners(image, transparency=1) == (RED, (255, 255, 255))


def test_cmyk():
  (upper, _) = corners(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind="JPEG")
  assert np.abs(np.subtract(upper, RED)).max() < 8


def test_a_photo_taken_sideways_is_turned():
  image = Image.new("RGB", (6, 4), RED)
  image.putpixel((0, 3), BLUE)  # lower left, which a turn to the right brings to the upper left
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(image, exif=exif)
  assert IMAGES.read(data).shape == (6, 4, 3)
  assert tuple(IMAGES.read(data)[0, 0]) == BLUE


def test_the_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED)]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert tuple(IMAGES.read(data)[0, 0]) == GREEN




@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"no image",
    encode(NOISE)[:-40],
    encode(NOISE)[:1500],
    encode(NOISE, "JPEG")[:-200],
    encode(NOISE, "WEBP", lossless=True)[:1000],
    encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
    encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"),
  ],
)
def test_broken_files_and_numbers_without_a_range_are_refused(data):
  with pytest.raises(ValueError, match="unreadable image: "):
    IMAGES.read(data)


def test_whatever_is_broken_in_a_file_is_one_kind_of_error():
  rng = np.random.default_rng(1)
  whole = np.frombuffer(encode(NOISE.resize((8, 8))), np.uint8)
  for _ in range(300):
    data = whole.copy()
    data[rng.integers(len(data), size=3)] = rng.integers(0, 256, 3)
    try:
      assert IMAGES.read(data.tobytes()).dtype == np.uint8
    except ValueError as error:
      assert "unreadable image" in str(error)
