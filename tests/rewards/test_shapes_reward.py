import numpy as np
import pytest

from jaxalign import rewards
from jaxalign.worlds.shapes import judge, scene

RED_CIRCLE = scene.Object("circle", "red", 32.0, 32.0, 24.0)
PROMPTS = [{"prompt": "a red circle"}, {"prompt": "a blue circle"}, {"prompt": "a red circle"}]


@pytest.fixture(scope="module")
def images():
  """The image that is asked for, the same under a prompt of another colour, and a blank one."""
  drawn = scene.render(scene.Scene("white", (RED_CIRCLE,)))
  blank = scene.render(scene.Scene("white", ()))
  images = np.stack([drawn, drawn, blank])
  return images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)


def test_correct_is_all_or_nothing(images):
  actual = rewards.make("shapes_correct").fn(images, PROMPTS)
  np.testing.assert_array_equal(actual, [1.0, 0.0, 0.0])
  assert actual.dtype == np.float32


def test_score_is_the_mean_of_the_facts(images):
  actual = rewards.make("shapes").fn(images, PROMPTS)
  facts = [judge.judge(x, p["prompt"]).facts for x, p in zip(images, PROMPTS, strict=True)]
  expected = np.float32([np.mean(list(f.values())) for f in facts])
  np.testing.assert_array_equal(actual, expected)
  assert actual[0] == 1.0 and 0.0 < actual[1] < 1.0 and actual[2] == 0.0
