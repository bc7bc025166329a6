import sys

import numpy as np
import pytest

from jaxalign import rewards

SOURCE = """
import numpy as np

LIMIT = 3

def red(images, prompts, *, scale=1.0):
  return scale * images[..., 0].mean(axis=(1, 2))

def length(images, prompts, **kwargs):
  return np.array([len(p["prompt"]) + kwargs.get("add", 0) for p in prompts])

def needs(images, prompts, power):
  return images.mean(axis=(1, 2, 3)) ** power
"""
IMAGES = np.random.default_rng(0).uniform(size=(2, 5, 7, 3)).astype(np.float32)
PROMPTS = [{"prompt": "a dog"}, {"prompt": "two dogs"}]


@pytest.fixture(autouse=True)
def module_folder(tmp_path, monkeypatch):
  package = tmp_path / "jaxalign_user_pkg"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "mine.py").write_text(SOURCE)
  (package / "broken.py").write_text("import a_module_that_is_not_there\n")
  (package / "crash.py").write_text("raise RuntimeError('no weights\\n  at this path')\n")
  (package / "syntax.py").write_text("def fn(:\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  yield tmp_path
  for name in [m for m in sys.modules if m.startswith("jaxalign_user_pkg")]:
    del sys.modules[name]


def message_of(name, **kwargs):
  with pytest.raises(ValueError) as caught:
    rewards.make(name, **kwargs)
  message = str(caught.value)
  assert name in message
  assert len(message.splitlines()) <= 3
  return message


def test_the_named_object_is_the_reward_function():
  reward = rewards.make("jaxalign_user_pkg.mine:red")
  assert reward.name == "jaxalign_user_pkg.mine:red"
  np.testing.assert_allclose(reward.fn(IMAGES, PROMPTS), IMAGES[..., 0].mean((1, 2)))


def test_kwargs_of_the_config_reach_it():
  scaled = rewards.make("jaxalign_user_pkg.mine:red", scale=2.0).fn(IMAGES, PROMPTS)
  np.testing.assert_allclose(scaled, 2 * IMAGES[..., 0].mean((1, 2)))
  added = rewards.make("jaxalign_user_pkg.mine:length", add=10).fn(IMAGES, PROMPTS)
  np.testing.assert_array_equal(added, [15, 18])


def test_wrong_kwargs_are_found_before_the_first_call():
  message = message_of("jaxalign_user_pkg.mine:red", scal=2.0)
  assert 'did you mean "scale"' in message
  assert "missing a required argument: 'power'" in message_of("jaxalign_user_pkg.mine:needs")


def test_missing_module():
  message = message_of("jaxalign_user_pkgg.mine:red")
  assert "ModuleNotFoundError: No module named 'jaxalign_user_pkgg'" in message
  assert "PYTHONPATH" in message


def test_module_that_does_not_import_shows_why_in_one_line():
  assert "No module named 'a_module_that_is_not_there'" in message_of("jaxalign_user_pkg.broken:f")
  assert "RuntimeError: no weights at this path\n" in message_of("jaxalign_user_pkg.crash:f")
  assert "SyntaxError" in message_of("jaxalign_user_pkg.syntax:f")


def test_missing_function_names_the_near_miss():
  message = message_of("jaxalign_user_pkg.mine:lenght")
  assert 'has no "lenght"; did you mean "length"?' in message


def test_not_a_function():
  assert "got int" in message_of("jaxalign_user_pkg.mine:LIMIT")


@pytest.mark.parametrize("name", [":red", "jaxalign_user_pkg.mine:", "a:b:c", "a.b:c d"])
def test_malformed_name(name):
  assert 'expected "package.module:function"' in message_of(name)
