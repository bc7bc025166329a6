import io

import numpy as np
from PIL import Image

from jaxalign import rewards

NOISE = np.random.default_rng(0).uniform(size=(4, 24, 40, 3)).astype(np.float32)
PROMPTS = [{"prompt": f"a dog number {i}"} for i in range(4)]


def size_in_kb(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "jpeg", quality=95)
  return len(file.getvalue()) / 1000


def test_equals_pillow_at_quality_95():
  pixels = np.random.default_rng(1).integers(0, 256, (4, 24, 40, 3)).astype(np.uint8)
  images = pixels.astype(np.float32) / 255
  expected = np.float32([size_in_kb(p) for p in pixels])
  assert len(set(expected.tolist())) > 1  # so that a wrong order would show
  np.testing.assert_array_equal(
    rewards.make("jpeg_incompressibility").fn(images, PROMPTS), expected
  )


def test_compressibility_is_the_negative():
  np.testing.assert_array_equal(
    rewards.make("jpeg_compressibility").fn(NOISE, PROMPTS),
    -rewards.make("jpeg_incompressibility").fn(NOISE, PROMPTS),
  )


def test_a_flat_image_is_smaller_than_a_ramp_and_a_ramp_than_noise():
  flat = np.full((24, 40, 3), 0.5, np.float32)
  ramp = np.broadcast_to(np.linspace(0, 1, 40, dtype=np.float32)[None, :, None], (24, 40, 3))
  compressibility = rewards.make("jpeg_compressibility").fn(
    np.stack([flat, ramp, NOISE[0]]), PROMPTS[:3]
  )
  assert compressibility[0] > compressibility[1] > compressibility[2]
  assert np.all(compressibility < 0)


def test_pixels_are_rounded_not_truncated():
  # 0.4 of a grey level up or down changes nothing; truncation would turn it into noise of one
  # level, which a flat image pays for dearly.
  offset = np.random.default_rng(2).choice([-0.4, 0.4], (24, 40, 3))
  image = ((100 + offset) / 255).astype(np.float32)
  actual = rewards.make("jpeg_incompressibility").fn(image[None], PROMPTS[:1])
  expected = size_in_kb(np.full((24, 40, 3), 100, np.uint8))
  np.testing.assert_array_equal(actual, np.float32([expected]))


def test_values_outside_the_range_are_clamped_not_wrapped():
  reward = rewards.make("jpeg_incompressibility").fn
  wide = NOISE * 3.0 - 1.0
  np.testing.assert_array_equal(reward(wide, PROMPTS), reward(np.clip(wide, 0, 1), PROMPTS))
