"""Training of a reward model, end to end in seconds and part by part."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from preference_records import record

from jaxalign.data import example_set, examples, preference_files
from jaxalign.modalities.image import IMAGES
from jaxalign.models.families import clip_dual
from jaxalign.recipes import shapes_reward
from jaxalign.training import reward_model
from jaxalign.worlds.shapes import prompts as shapes_prompts
from jaxalign.worlds.shapes import scene as shapes_scene


def render(text, seed):
  spec = shapes_prompts.parse(text)
  return shapes_scene.render(shapes_prompts.sample_scene(np.random.default_rng(seed), spec))


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
  """Twelve pairs: a scene of the prompt and one of another colour, in either order."""
  folder = tmp_path_factory.mktemp("pairs")
  lines = []
  for i in range(12):
    texts = ["a red circle", "a blue circle"][:: (-1) ** (i // 2)]
    shown = texts[:: (-1) ** i]
    for j, text in enumerate(shown):
      Image.fromarray(render(text, [i, j])).save(folder / f"{i}_{j}.png")
    images = [f"{i}_{j}.png" for j in (0, 1)]
    row = {"prompt": texts[0], "images": images, "label_0": float(shown[0] == texts[0])}
    lines.append(json.dumps(row))
  file = folder / "pairs.jsonl"
  file.write_text("\n".join(lines))
  return file


@pytest.fixture
def config(load_config, pairs_file):
  config = load_config("reward_model")
  config.data.source = config.held_out = str(pairs_file)
  tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
  config.model.text_config.update(tower)
  config.model.vision_config.update({**tower, "patch_size": 32})
  config.model.projection_dim = 8
  config.warm_start.batches.batch_size = 8
  config.warm_start.fit.update({"num_steps": 3, "warmup_steps": 1, "checkpoint_every": 1})
  config.preferences.batches.batch_size = 6
  fit = {"num_steps": 200, "warmup_steps": 5, "checkpoint_every": 35, "learning_rate": 1e-2}
  config.preferences.fit.update(fit)
  return config


def test_a_run_learns_and_can_be_resumed(config, tmp_path, monkeypatch):
  folder = reward_model.fit(config, tmp_path / "whole", shapes_reward.warm_start)
  found = json.loads((tmp_path / "whole" / "accuracy.json").read_text())
  assert found == {"accuracy": 1.0, "standard_error": 0.0, "num_pairs": 12, "num_records": 12}
  whole = clip_dual.load(folder)

  def interrupted(*args, **kwargs):
    batches = make_batches(*args, **kwargs)

    def stop_at(step):
      if step == 75:
        raise KeyboardInterrupt
      return batches(step)

    return stop_at

  make_batches = reward_model.pair_batches
  monkeypatch.setattr(reward_model, "pair_batches", interrupted)
  with pytest.raises(KeyboardInterrupt):
    reward_model.fit(config, tmp_path / "resumed", shapes_reward.warm_start)
  monkeypatch.undo()
  resumed = clip_dual.load(reward_model.fit(config, tmp_path / "resumed", shapes_reward.warm_start))
  jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)

  # From a folder that holds a model, and without held-out pairs: no step, so all but the scale is
  # as it was.
  config.init_from, config.held_out = str(folder), ""
  config.preferences.fit.num_steps = 0
  again = clip_dual.load(reward_model.fit(config, tmp_path / "again", shapes_reward.warm_start))
  assert not (tmp_path / "again" / "warm_start").exists()
  assert not (tmp_path / "again" / "accuracy.json").exists()
  assert again.params["logit_scale"] == config.preferences.logit_scale
  expected = {**whole.params, "logit_scale": again.params["logit_scale"]}
  jax.tree.map(np.testing.assert_array_equal, again.params, expected)


def test_missing_pairs_are_found_before_anything_is_fitted(config, tmp_path):
  config.data.source = str(tmp_path / "none.parquet")
  with pytest.raises(ValueError, match=r"no such file .*none\.parquet"):
    reward_model.fit(config, tmp_path / "run", shapes_reward.warm_start)
  assert not (tmp_path / "run" / "warm_start").exists()


def fake_tokenize(texts):
  return np.array([[len(text)] for text in texts], np.int32)


def numbered(pairs):
  """In the place of text features: the number of each pair."""
  return np.arange(len(pairs), dtype=np.float32)[:, None]


def test_scene_batches():
  batches = shapes_reward.scene_batches(fake_tokenize, seed=3, batch_size=24, group_size=4)
  captions = []

  def tokenize(texts):
    captions.append(list(texts))
    return fake_tokenize(texts)

  recorded = shapes_reward.scene_batches(tokenize, seed=3, batch_size=24, group_size=4)
  images, token_ids, also_true = recorded(5)
  for actual, again in zip((images, token_ids, also_true), batches(5), strict=True):
    np.testing.assert_array_equal(actual, again)
  assert not np.array_equal(images, batches(6)[0])

  assert images.shape == (24, 64, 64, 3) and images.dtype == np.uint8
  (texts,) = captions
  np.testing.assert_array_equal(token_ids[:, 0], [len(text) for text in texts])
  assert set(texts) <= {prompt.text for prompt in shapes_prompts.train_prompts()}
  assert also_true.dtype == bool and also_true.diagonal().all()
  for i in range(6):  # six prompts, and three near misses of each
    originals, near = texts[i], texts[i + 6 :: 6]
    categories = {shapes_prompts.parse(text).category for text in (originals, *near)}
    assert originals not in near and len(categories) == 1
    assert not also_true[i, i + 6 :: 6].any()


def test_no_caption_of_a_scene_is_a_held_out_prompt(load_config):
  config = load_config("reward_model")
  captions = []
  batches = shapes_reward.scene_batches(
    lambda texts: captions.extend(texts), seed=config.seed, **config.warm_start.batches
  )
  for step in range(20):
    batches(step)
  facts = {shapes_prompts.canonical(shapes_prompts.parse(text)) for text in captions}
  assert not facts & {shapes_prompts.canonical(p.spec) for p in shapes_prompts.held_out_prompts()}


def test_a_batch_that_groups_do_not_fill_is_refused():
  with pytest.raises(ValueError, match="multiple of group_size, got 10 and 4"):
    shapes_reward.scene_batches(fake_tokenize, seed=0, batch_size=10, group_size=4)


# In the place of a CLIP: scores an image by its mean, and has features to compare by hand.
FAKE = types.SimpleNamespace(
  params={"logit_scale": np.log(np.float32(2.0))},
  tokenize=fake_tokenize,
  score=lambda params, images, token_ids: 2.0 * jnp.mean(images, axis=(1, 2, 3)),
  image_features=lambda params, images: images[:, 0, 0, :2],
  text_features=lambda params, token_ids: token_ids,
)


def pairs_of(records, size, ties="half"):
  of_record = functools.partial(examples.pairs, ties=ties)
  return example_set.ExampleSet(records, of_record, IMAGES, shape=(*size, 3))


@pytest.fixture
def grey_pairs(tmp_path):
  """Four pairs of grey images, of which the first three have a preferred one."""
  lines = []
  for i, (shades, label) in enumerate([((9, 3), 1), ((9, 3), 0), ((5, 5), 1), ((9, 3), 0.5)]):
    for j, shade in enumerate(shades):
      Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(tmp_path / f"{i}_{j}.png")
    images = [f"{i}_{j}.png" for j in (0, 1)]
    lines.append(json.dumps({"prompt": "x" * (i + 1), "images": images, "label_0": label}))
  (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
  records, _ = preference_files.load(tmp_path / "pairs.jsonl", IMAGES)
  return pairs_of(records, (8, 8))


@pytest.mark.parametrize("batch_size", [2, 3, 256])
def test_accuracy_by_hand(grey_pairs, batch_size):
  # Right, wrong, equal; the tie is not counted. The variance of 1, 0, 0.5 is 1 / 6.
  found = reward_model.accuracy(FAKE, grey_pairs, batch_size)
  assert found["accuracy"] == 0.5 and found["num_pairs"] == found["num_records"] == 3
  np.testing.assert_allclose(found["standard_error"], (1 / 6 / 3) ** 0.5)


def test_accuracy_counts_a_ranking_once():
  # Greys 0, 1 and 2. The first record prefers the darker, so all three pairs are wrong; of the
  # second two of three are right, of the third the only one. The fourth has no preferred image.
  records = [record(rank=rank) for rank in ([1, 2, 3], [2, 3, 1], [2, 1], [1, 1])]
  found = reward_model.accuracy(FAKE, pairs_of(records, (4, 6)))
  shares = [0, 2 / 3, 1]
  np.testing.assert_allclose(found["accuracy"], np.mean(shares), rtol=1e-6)
  np.testing.assert_allclose(found["standard_error"], np.std(shares) / 3**0.5, rtol=1e-6)
  assert (found["num_pairs"], found["num_records"]) == (7, 3)


def test_preference_loss_by_hand(grey_pairs):
  features = numbered(grey_pairs)
  batches = reward_model.pair_batches(grey_pairs, features, seed=0, batch_size=4, max_shift=2)
  images, of_prompts, p = batches(0)
  order = of_prompts[:, 0]
  assert images.shape == (4, 2, 8, 8, 3) and sorted(order) == [0, 1, 2, 3]
  np.testing.assert_array_equal(p[np.argsort(order)], [1, 1, 1, 0.5])
  batch = (images, np.tile(np.float32([1, 0]), (4, 1)), p)  # selects the first of two features
  loss, metrics = reward_model.make_preference_loss(FAKE)(FAKE.params, batch, None)
  # Rewards are 2 * shade / 255. Winner minus loser: 12 / 255, -12 / 255, 0, and 12 / 255 of a tie.
  d = 12 / 255
  expected = [np.log1p(np.exp(-d)), np.log1p(np.exp(d)), np.log(2), d / 2 + np.log1p(np.exp(-d))]
  np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
  np.testing.assert_allclose(metrics["reward/margin"], 0.75 * d, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy/preferences"], 0.5)  # 1, 0, and two halves


def test_shifts_are_small_and_change_with_the_step(pairs_file):
  records, _ = preference_files.load(pairs_file, IMAGES)
  pairs = pairs_of(records, (64, 64), ties="drop")
  still, moved = (
    reward_model.pair_batches(pairs, numbered(pairs), seed=0, batch_size=12, max_shift=shift)
    for shift in (0, 3)
  )
  images, of_prompts, p = still(0)
  np.testing.assert_array_equal(images, pairs.samples(pairs.draw_for_step(0, 0, 12)))
  again, of_prompts_again, p_again = moved(0)
  np.testing.assert_array_equal(of_prompts_again, of_prompts)
  np.testing.assert_array_equal(p_again, p)
  np.testing.assert_array_equal(moved(0)[0], again)
  # What is three pixels off the border is found again in a window of seven by seven shifts.
  inner = images[..., 3:-3, 3:-3, :]
  flat = again.reshape(-1, 64, 64, 3), inner.reshape(-1, 58, 58, 3)
  for shown, original in zip(*flat, strict=True):
    windows = [shown[i : i + 58, j : j + 58] for i in range(7) for j in range(7)]
    assert any(np.array_equal(window, original) for window in windows)
  assert not np.array_equal(again, images)


def test_contrastive_loss_by_hand():
  images = np.zeros((2, 4, 4, 3), np.uint8)
  images[0, 0, 0, 0] = images[1, 0, 0, 1] = 255  # features [1, 0] and [0, 1]
  token_ids = np.array([[1.0, 0.0], [0.5, 0.0]], np.float32)
  also_true = np.eye(2, dtype=bool)
  loss_fn = shapes_reward.make_contrastive_loss(FAKE, bend=(0.0, 0.0), max_blur=0.0)
  loss, metrics = loss_fn(FAKE.params, (images, token_ids, also_true), jax.random.key(0))
  # Logits [[2, 1], [0, 0]], and the same again of images that were bent by nothing: rows
  # softmax(2, 1) and (0, 0); columns (2, 0, 2, 0) and (1, 0, 1, 0).
  rows = [np.log1p(np.exp(-1.0)), np.log(2)]
  columns = [np.log(2) + np.log1p(np.exp(-2.0)), np.log(2) + np.log1p(np.exp(1.0))]
  np.testing.assert_allclose(loss, (sum(rows) + sum(columns)) / 4, rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy/caption"], 0.5)  # image 1 ties, which is no success
  assert metrics["accuracy/straight"] == 0.0


def test_bent_images_are_displaced_by_what_is_asked_for():
  ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[None, None, :, None], (64, 64, 64, 1))
  strength = np.where(np.arange(64) < 32, 2.0, 0.0).astype(np.float32)
  found = np.asarray(shapes_reward.bent(jax.random.key(0), ramp, strength))
  np.testing.assert_allclose(found[32:], ramp[32:], atol=1e-5)
  shift = (found - ramp)[:32, :, 16:56]  # far from the border, where displacements are cut off
  np.testing.assert_allclose(shift[:, ::8, ::8].std(), 2.0, rtol=0.05)  # at the knots
  middle = shift[:, ::8, 4]  # half way between two of them
  np.testing.assert_allclose(middle, shift[:, ::8, [0, 8]].mean(axis=2), atol=1e-4)
  other = shapes_reward.bent(jax.random.key(1), ramp, strength)
  assert not np.allclose(found[:32], other[:32])
  flat = np.full((2, 20, 12, 3), 0.3, np.float32)  # sides that knots do not divide
  np.testing.assert_allclose(shapes_reward.bent(jax.random.key(0), flat, strength[:2]), flat)


def test_blurred_is_the_mean_of_nine_at_full_strength():
  images = np.random.default_rng(0).random((2, 7, 5, 3), np.float32)
  found = shapes_reward.blurred(images, np.float32([0.0, 1.0]))
  np.testing.assert_allclose(found[0], images[0], rtol=1e-6)
  expected = scipy.ndimage.uniform_filter(images[1], (3, 3, 1), mode="nearest")
  np.testing.assert_allclose(found[1], expected, rtol=1e-5)
