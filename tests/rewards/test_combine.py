import ml_collections
import numpy as np
import pytest

from jaxalign.rewards import combine, contract

IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
PROMPTS = [{"prompt": "a dog"}] * 4
A = np.float32([1, 2, 3, 6])
B = np.float32([10, 30, 10, 30])
NAMES = ("jpeg_compressibility", "jpeg_incompressibility")


def evaluate(rewards, images=IMAGES):
  named = rewards.on_host(images, PROMPTS)
  return rewards.total(named), named


def weighted(normalize, weights=(1.0, -0.5), fns=(lambda i, p: A, lambda i, p: B)):
  built = tuple(contract.Reward(name, fn) for name, fn in zip("ab", fns, strict=True))
  return combine.WeightedRewards(built, weights, normalize)


def test_none_is_the_weighted_sum_of_raw_rewards():
  total, named = evaluate(weighted("none"))
  np.testing.assert_array_equal(total, [-4, -13, -2, -9])
  assert total.dtype == np.float32
  assert list(named) == ["a", "b"]
  np.testing.assert_array_equal(named["a"], A)
  np.testing.assert_array_equal(named["b"], B)


def test_batch_standardises_each_reward_before_weighting():
  total, named = evaluate(weighted("batch"))
  # a: mean 3, squares 4 + 1 + 0 + 9 = 14, std sqrt(3.5). b: mean 20, std 10.
  expected = np.array([-2, -1, 0, 3]) / np.sqrt(3.5) - 0.5 * np.array([-1, 1, -1, 1])
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  np.testing.assert_array_equal(named["b"], B)  # raw rewards are what is logged


@pytest.mark.parametrize("normalize", ["none", "batch"])
def test_what_is_logged_is_raw_whatever_the_normalisation(normalize):
  rewards = tuple(contract.Reward(name, None) for name in ("a", "b"))
  total = combine.WeightedRewards(rewards, (2.0, -0.5), normalize)
  named = {"a": np.float32([1.0, 2.0, 6.0]), "b": np.float32([4.0, 0.0, 2.0])}
  np.testing.assert_array_equal(total.raw(named), [0.0, 4.0, 11.0])


def test_batch_ignores_scale_and_offset_and_none_does_not():
  scaled = weighted("batch", fns=(lambda i, p: 100 * A + 7, lambda i, p: B))
  np.testing.assert_allclose(
    evaluate(scaled)[0], evaluate(weighted("batch"))[0], rtol=1e-6
  )


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7])
def test_a_constant_reward_adds_nothing_under_batch(value):
  constant = weighted("batch", fns=(lambda i, p: np.full(4, value, np.float32), lambda i, p: B))
  np.testing.assert_array_equal(evaluate(constant)[0], [0.5, -0.5, 0.5, -0.5])


def test_microbatches_combine_to_the_whole_batch():
  total = combine.make_total(NAMES, weights=(2.0, 0.5), normalize="batch")
  whole, _ = evaluate(total)
  parts = [total.on_host(IMAGES[i : i + 2], PROMPTS[i : i + 2]) for i in (0, 2)]
  named = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  np.testing.assert_array_equal(total.total(named), whole)
  assert np.abs(whole).max() > 0.1


def test_a_reward_that_raises_is_named():
  def broken(images, prompts):
    return prompts[0]["caption"]

  bad = weighted("none", fns=(lambda i, p: A, broken))
  with pytest.raises(contract.RewardError, match=r'reward "b" failed: KeyError: .caption.'):
    bad.on_host(IMAGES, PROMPTS)


def test_a_non_finite_reward_comes_with_its_image():
  bad = weighted("none", fns=(lambda i, p: A, lambda i, p: np.array([1, 2, np.nan, 4])))
  with pytest.raises(contract.RewardError, match=r'reward "b": 1 of 4 .*index 2') as caught:
    bad.on_host(IMAGES, PROMPTS)
  assert caught.value.index == 2
  np.testing.assert_array_equal(caught.value.sample, IMAGES[2])


def test_a_wrong_shape_names_the_reward():
  bad = weighted("none", fns=(lambda i, p: A, lambda i, p: B[:3]))
  with pytest.raises(contract.RewardError, match=r'reward "b": expected shape \(4,\)'):
    bad.on_host(IMAGES, PROMPTS)


def test_one_prompt_per_image():
  with pytest.raises(ValueError, match="expected one record per sample, got 3 for 4"):
    weighted("none").on_host(IMAGES, PROMPTS[:3])


def test_a_total_that_overflows_is_an_error():
  with pytest.raises(contract.RewardError, match='"total": 4 of 4 values are not finite'):
    evaluate(weighted("none", weights=(1e39, 0.0)))


def test_the_default_is_the_plain_sum():
  built = combine.make_total(NAMES)
  assert built.weights == (1.0, 1.0) and built.normalize == "none"
  # The two rewards are each other's negative.
  np.testing.assert_allclose(evaluate(built)[0], np.zeros(4), atol=1e-6)


def test_it_takes_a_config_section_as_a_dict():
  section = ml_collections.ConfigDict(
    {"names": NAMES[:1], "weights": (3.0,), "kwargs": ({},), "normalize": "none"}
  )
  assert combine.make_total(**section.to_dict()).weights == (3.0,)


def test_kwargs_reach_their_reward(tmp_path, monkeypatch):
  source = "def bright(images, prompts, *, gain):\n  return gain * images.mean((1, 2, 3))\n"
  (tmp_path / "my_rewards_for_kwargs.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  names = [NAMES[0], "my_rewards_for_kwargs:bright"]
  built = combine.make_total(names, weights=[0.0, 1.0], kwargs=[{}, {"gain": 4.0}])
  np.testing.assert_allclose(evaluate(built)[0], 4.0 * IMAGES.mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
  "names, changes, message",
  [
    ((), {}, "at least one reward; valid names: .*shapes"),
    (NAMES, {"weights": (1.0,)}, r"weights with one entry for each name, got \(1.0,\) for jpeg"),
    (NAMES[:1], {"kwargs": ({}, {})}, "kwargs with one entry for each name"),
    (NAMES[:1], {"kwargs": ({"quality": 3},)}, "valid keys: none"),
    (NAMES[:1], {"weights": (float("nan"),)}, "expected a finite number as weight, got nan"),
    (NAMES[:1], {"weights": ("2",)}, "expected a finite number as weight, got '2'"),
    (NAMES[:1], {"normalize": "bath"}, 'none, batch, got "bath"; did you mean "batch"'),
    (("jpeg_compresibility",), {}, 'did you mean "jpeg_compressibility"'),
    ((NAMES[0], NAMES[0]), {}, "expected each reward once, got jpeg_compressibility"),
    ("shapes", {}, "expected a sequence of names"),
  ],
)
def test_wrong_lists_are_named(names, changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    combine.make_total(names, **changes)
  assert len(str(caught.value).splitlines()) <= 3
