import subprocess
import sys

import numpy as np
import pytest

from jaxalign import rewards
from jaxalign.worlds.shapes import scene

PROMPTS = [
  {"prompt": "a red circle", "id": 0},
  {"prompt": "a blue square", "id": 1},
  {"prompt": "a green cross", "id": 2},
]


@pytest.fixture(scope="module")
def images():
  wanted = [("circle", "red"), ("square", "green"), ("circle", "blue")]
  drawn = [
    scene.render(scene.Scene("white", (scene.Object(shape, colour, 30.0, 34.0, size),)))
    for (shape, colour), size in zip(wanted, (20.0, 22.0, 25.0), strict=True)
  ]
  images = np.stack(drawn)
  return images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)


@pytest.mark.parametrize("name", [name for name in rewards.REWARDS if "planner" not in name])
def test_every_reward_keeps_the_contract(name, images):
  reward = rewards.make(name)
  assert reward.name == name
  before = images.copy()
  values = reward.fn(images, PROMPTS)
  assert values.shape == (3,) and values.dtype == np.float32
  assert np.isfinite(values).all() and len(set(values.tolist())) > 1
  np.testing.assert_array_equal(images, before)
  np.testing.assert_array_equal(reward.fn(images, PROMPTS), values)  # deterministic
  order = [2, 0, 1]
  np.testing.assert_array_equal(
    reward.fn(images[order], [PROMPTS[i] for i in order]), values[order]
  )
  np.testing.assert_array_equal(reward.fn(images[1:2], PROMPTS[1:2]), values[1:2])


def test_unknown_name_lists_the_valid_ones_and_the_near_miss():
  with pytest.raises(ValueError) as caught:
    rewards.make("jpeg_compresibility")
  message = str(caught.value)
  assert 'unknown reward "jpeg_compresibility"; did you mean "jpeg_compressibility"?' in message
  assert all(name in message for name in rewards.REWARDS)
  assert "package.module:function" in message
  assert len(message.splitlines()) <= 3


def test_misspelt_argument_names_the_near_miss():
  with pytest.raises(ValueError, match=r'"shapes".*kinds.*valid keys: none'):
    rewards.make("shapes", kinds="score")
  with pytest.raises(ValueError, match=r"quality.*valid keys: none"):
    rewards.make("jpeg_compressibility", quality=50)


def test_importing_rewards_imports_neither_jax_nor_a_world():
  code = (
    "import sys; import jaxalign.rewards\n"
    "heavy = {'jax', 'flax', 'jaxalign.worlds'} & set(sys.modules)\n"
    "assert not heavy, heavy"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


# ---- check_rewards


@pytest.mark.parametrize(
  "values",
  [np.float32([1, 2]), np.float64([1, 2]), np.int64([1, 2]), [1.0, 2], np.float16([1, 2])],
)
def test_numbers_become_float32(values):
  checked = rewards.check_rewards("mine", values, 2)
  assert checked.dtype == np.float32
  np.testing.assert_array_equal(checked, [1.0, 2.0])


@pytest.mark.parametrize(
  "values, found",
  [
    (np.zeros(4, np.float32), r"shape \(3,\).*got \(4,\)"),
    (np.zeros((3, 1), np.float32), r"shape \(3,\).*got \(3, 1\)"),
    (np.float32(0.5), r"shape \(3,\).*got \(\)"),
    (np.zeros(3, np.complex64), "expected numbers, got dtype complex64"),
    (np.array([1.0, None, 2.0]), "expected numbers, got dtype object"),
    (np.array(["1", "2", "3"]), "expected numbers, got dtype <U1"),
    (None, "expected numbers, got dtype object"),
    ([[1.0, 2.0], [3.0]], "expected an array"),
  ],
)
def test_a_wrong_return_value_is_named(values, found):
  with pytest.raises(rewards.RewardError, match=found) as caught:
    rewards.check_rewards("mine", values, 3)
  assert str(caught.value).startswith('reward "mine": ')
  assert len(str(caught.value).splitlines()) <= 3
  assert caught.value.index is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_says_how_many_and_where(bad):
  values = np.array([0.0, 1.0, bad, 2.0, bad])
  with pytest.raises(rewards.RewardError, match=r'"mine": 2 of 5 .* at index 2') as caught:
    rewards.check_rewards("mine", values, 5)
  assert caught.value.index == 2
  assert isinstance(caught.value, ValueError)
