"""Rewards on the device: the same contract for each, and the same numbers as on the host."""

import jax
import numpy as np
import pytest

from jaxalign import rewards
from jaxalign.models.families import clip_dual
from jaxalign.worlds.shapes import prompts as shapes_prompts
from jaxalign.worlds.shapes import scene, tokenizer

OTHER_SAMPLES = ("gaussian", "planner")  # tested in files of their own
PROMPTS = [{"prompt": text, "id": 7} for text in ("a red circle", "a blue square", "two rings")]

MODULE = """
import jax.numpy as jnp
import numpy as np
from jaxalign.rewards import DeviceReward

def brightness(*, scale=1.0) -> DeviceReward:
  def encode(prompts):
    return {"length": np.array([len(p["prompt"]) for p in prompts], np.float32)}

  def score(params, images, encoded):
    return params["scale"] * jnp.square(images).mean((1, 2, 3)) + 0.0 * encoded["length"]

  return DeviceReward("mine", {"scale": np.float32(scale)}, encode, score)

def postponed() -> "DeviceReward":
  return brightness(scale=2.0)

def not_one() -> DeviceReward:
  return 3

def on_host(images, prompts):
  return images.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  drawn = [
    scene.render(shapes_prompts.sample_scene(rng, shapes_prompts.parse(prompt["prompt"])))
    for prompt in PROMPTS
  ]
  return np.stack(drawn).astype(np.float32) / 255


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
  """A small CLIP with random weights, for images of another size than those of the test."""
  folder = tmp_path_factory.mktemp("clip")
  vocab_size = tokenizer.write_tokenizer(folder, {"red", "circle"}, context_length=8)
  tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
  tower["num_attention_heads"] = 2
  text = {**tower, "vocab_size": vocab_size, "max_position_embeddings": 8, "eos_token_id": 2}
  vision = {**tower, "image_size": 16, "patch_size": 8}
  config = {"text_config": text, "vision_config": vision, "projection_dim": 4}
  model = clip_dual.build(config, tokenizer_folder=folder)
  clip_dual.save(model.with_params(model.init_params(jax.random.key(0))), folder)
  return folder


@pytest.fixture
def my_module(tmp_path, monkeypatch):
  (tmp_path / "my_device_rewards.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  return "my_device_rewards"


@pytest.fixture(params=["clip", "shapes_learned", "my_device_rewards:brightness"])
def named(request, clip_folder, my_module):
  """(name, keyword arguments)."""
  return request.param, {"path": clip_folder} if request.param == "clip" else {}


def test_every_device_reward_is_tested(request):
  marks = [mark for mark in named._fixture_function_marker.params if ":" not in mark]
  images = [name for name in rewards.DEVICE_REWARDS if not name.startswith(OTHER_SAMPLES)]
  assert set(marks) == set(images)


def test_every_device_reward_keeps_the_contract(named, images):
  name, kwargs = named
  reward = rewards.make_device(name, **kwargs)
  assert reward.name == name
  encoded = reward.encode(PROMPTS)
  leaves = jax.tree.leaves(encoded)
  assert leaves and all(isinstance(x, np.ndarray) and len(x) == len(PROMPTS) for x in leaves)

  values = reward.score(reward.params, images, encoded)
  assert values.shape == (3,) and values.dtype == np.float32
  assert np.isfinite(values).all() and len(set(np.asarray(values).tolist())) == 3
  jitted = jax.jit(reward.score)
  np.testing.assert_allclose(jitted(reward.params, images, encoded), values, rtol=1e-5, atol=1e-5)

  total = jax.jit(jax.grad(lambda images: reward.score(reward.params, images, encoded).sum()))
  grad = np.asarray(total(images))
  assert grad.shape == images.shape and np.isfinite(grad).all()
  assert (np.abs(grad).max(axis=(1, 2, 3)) > 0).all()


def test_a_step_along_the_gradient_raises_the_reward(named, images):
  name, kwargs = named
  reward = rewards.make_device(name, **kwargs)
  encoded = reward.encode(PROMPTS)
  total = jax.jit(jax.value_and_grad(lambda x: reward.score(reward.params, x, encoded).sum()))
  value, grad = total(images)
  # To first order the gain is the length of the step times the gradient's: well above what a sum of
  # all pixels loses in float32, and a small step for rewards that are steep.
  gain = 1e-3
  raised, _ = total(images + gain / np.square(np.linalg.norm(grad)) * grad)
  np.testing.assert_allclose(raised - value, gain, rtol=0.1)


def test_the_form_on_the_host_gives_the_same_numbers(named, images):
  name, kwargs = named
  reward = rewards.make(name, **kwargs)
  assert reward.name == reward.device.name == name
  values = reward.fn(images, PROMPTS)
  assert isinstance(values, np.ndarray) and values.dtype == np.float32
  device = jax.jit(reward.device.score)
  expected = device(reward.device.params, images, reward.device.encode(PROMPTS))
  np.testing.assert_array_equal(values, expected)
  order = [2, 0, 1]
  shuffled = reward.fn(images[order], [PROMPTS[i] for i in order])
  np.testing.assert_allclose(shuffled, values[order], rtol=1e-5, atol=1e-5)


def test_a_reward_of_the_host_has_no_form_on_the_device(my_module):
  assert rewards.make("shapes").device is None
  assert rewards.make(f"{my_module}:on_host").device is None
  for name in ("jpeg_compressibility", f"{my_module}:on_host"):
    with pytest.raises(ValueError, match=r"runs on the host only.*clip, shapes_learned"):
      rewards.make_device(name)


def test_a_users_own_factory(my_module, images):
  assert rewards.make(f"{my_module}:postponed").device.params == {"scale": np.float32(2.0)}
  doubled = rewards.make(f"{my_module}:brightness", scale=2.0).fn(images, PROMPTS)
  np.testing.assert_allclose(doubled, 2 * np.square(images).mean((1, 2, 3)), rtol=1e-5)
  with pytest.raises(ValueError, match=r"scal.*valid keys: scale"):
    rewards.make(f"{my_module}:brightness", scal=2.0)
  with pytest.raises(ValueError, match=r"not_one.*return a DeviceReward.*got int"):
    rewards.make(f"{my_module}:not_one")


def test_names_and_paths_that_do_not_exist(tmp_path):
  with pytest.raises(ValueError, match=r'unknown reward "shapes_learnt".*"shapes_learned"'):
    rewards.make_device("shapes_learnt")
  with pytest.raises(ValueError, match="expected the folder of a CLIPModel"):
    rewards.make("clip", path=tmp_path / "nowhere")
