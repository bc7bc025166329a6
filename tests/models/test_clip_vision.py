"""Both towers of CLIP against transformers' PyTorch ones, on random weights."""

import json

import jax
import numpy as np
import pytest

from jaxalign.models.families import clip_dual
from jaxalign.models.networks import clip_vision
from jaxalign.worlds.shapes import tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

CONFIGS = {
  "quick_gelu": {
    "projection_dim": 5,
    "text": {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3},
    "vision": {"hidden_size": 18, "intermediate_size": 7, "num_attention_heads": 2},
  },
  "gelu": {
    "projection_dim": 14,
    "text": {"hidden_size": 10, "num_attention_heads": 1, "hidden_act": "gelu", "eos_token_id": 2},
    "vision": {"hidden_size": 15, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "image_size": 21},
  },
}
COMMON = {"intermediate_size": 11, "num_hidden_layers": 2}
PROMPTS = ["ab", "a ab b", "b a b a b", ""]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
  """(our model, the PyTorch model, the folder that the latter was saved in)."""
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp(request.param)
  vocab_size = tokenizer.write_tokenizer(folder, {"ab"}, context_length=9)
  config = CONFIGS[request.param]
  ids = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": 1}
  text = {"vocab_size": vocab_size, "max_position_embeddings": 9, **ids}
  vision = {"image_size": 12, "patch_size": 3, "num_attention_heads": 3}
  oracle = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config={**COMMON, **text, **config["text"]},
      vision_config={**COMMON, **vision, **config["vision"]},
      projection_dim=config["projection_dim"],
    )
  ).eval()
  with torch.no_grad():
    for parameter in oracle.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  oracle.save_pretrained(folder)
  return clip_dual.load(folder), oracle, folder


def draw_images(size, batch_size=4):
  rng = np.random.default_rng(0)
  return rng.uniform(size=(batch_size, size, size, 3)).astype(np.float32)


def oracle_logits(oracle, inputs, token_ids):
  """Normalised images `[B, H, W, 3]` against every prompt, `[B, B]`."""
  with torch.no_grad():
    pixels = torch.from_numpy(np.array(inputs)).permute(0, 3, 1, 2)
    out = oracle(input_ids=torch.from_numpy(token_ids).long(), pixel_values=pixels)
  return out.logits_per_image.numpy()


def close(actual, expected, rtol=1e-5):
  """Within `rtol` of the largest value."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_matches_transformers(pair):
  model, oracle, _ = pair
  size = model.network.config.vision.image_size
  images, token_ids = draw_images(size), model.tokenize(PROMPTS)
  expected = oracle_logits(oracle, clip_vision.preprocess(images, size), token_ids)
  features = jax.jit(model.image_features)(model.params, images)
  text = jax.jit(model.text_features)(model.params, token_ids)
  close(np.exp(model.params["logit_scale"]) * features @ text.T, expected)
  close(jax.jit(model.score)(model.params, images, token_ids), np.diagonal(expected))


def test_towers_match_transformers(pair):
  """Before the projections, where a scale that the cosine would hide still shows."""
  model, oracle, _ = pair
  config = model.network.config.vision
  inputs = draw_images(config.image_size) - 0.5
  tower = clip_vision.VisionTransformer(config)
  pooled = jax.jit(tower.apply)({"params": model.params["vision_model"]}, inputs)
  with torch.no_grad():
    expected = oracle.vision_model(torch.from_numpy(inputs).permute(0, 3, 1, 2)).pooler_output
  close(pooled, expected.numpy())


def test_round_trip_through_transformers(pair, tmp_path):
  model, oracle, _ = pair
  doubled = model.with_params(jax.tree.map(lambda leaf: 1.5 * leaf, model.params))
  clip_dual.save(doubled, tmp_path)
  ours = clip_dual.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, ours.params, doubled.params)
  assert ours.config == model.config

  theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  size = model.network.config.vision.image_size
  images = draw_images(size)
  token_ids = transformers.CLIPTokenizer.from_pretrained(tmp_path)(
    PROMPTS, padding="max_length", truncation=True
  )["input_ids"]
  np.testing.assert_array_equal(ours.tokenize(PROMPTS), token_ids)
  expected = oracle_logits(theirs, clip_vision.preprocess(images, size), np.array(token_ids))
  close(jax.jit(ours.score)(ours.params, images, np.array(token_ids)), np.diagonal(expected))
  assert not np.allclose(expected, oracle_logits(oracle, images, np.array(token_ids)), rtol=1e-2)


def test_initial_parameters(pair):
  model, _, _ = pair
  params = model.init_params(jax.random.key(0))
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.params)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  np.testing.assert_allclose(params["logit_scale"], 2.6592)
  # The kernel of the patches: variance 1 / (3 * 3 * 3). The standard error of the ratio is below
  # 0.04, as there are over 400 entries.
  kernel = params["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
  np.testing.assert_allclose(kernel.std() * 27**0.5, 1.0, atol=0.15)
  again = model.init_params(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, again)


def test_preprocess_by_hand():
  images = np.full((1, 4, 4, 3), 0.5, np.float32)
  expected = [0.06903777, 0.16139113, 0.33283723]  # (0.5 - mean) / std of each channel
  np.testing.assert_allclose(clip_vision.preprocess(images, 4)[0, 1, 2], expected, rtol=1e-4)
  np.testing.assert_allclose(clip_vision.preprocess(images, 3)[0, 1, 2], expected, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(30, 30), (7, 7), (30, 41), (41, 30), (12, 17)])
def test_preprocess_matches_torch(height, width):
  images = np.random.default_rng(0).uniform(size=(2, height, width, 3)).astype(np.float32)
  scaled = (12 * height // min(height, width), 12 * width // min(height, width))
  expected = torch.nn.functional.interpolate(
    torch.from_numpy(images).permute(0, 3, 1, 2), scaled, mode="bicubic", antialias=True
  ).permute(0, 2, 3, 1)
  top, left = (scaled[0] - 12) // 2, (scaled[1] - 12) // 2
  expected = expected[:, top : top + 12, left : left + 12].numpy()
  expected = (expected - np.array(clip_vision.MEAN)) / np.array(clip_vision.STD)
  np.testing.assert_allclose(clip_vision.preprocess(images, 12), expected, atol=1e-4)


def test_an_image_of_the_right_size_is_not_resampled():
  images = draw_images(12)
  expected = (images - np.float32(clip_vision.MEAN)) / np.float32(clip_vision.STD)
  np.testing.assert_allclose(clip_vision.preprocess(images, 12), expected, atol=1e-6)


def test_unsupported_configs_are_refused(pair, tmp_path):
  model, _, folder = pair
  vision = {**model.config["vision_config"], "patch_size": 5}
  with pytest.raises(ValueError, match="not divisible by patch_size 5"):
    clip_dual.CLIPConfig.from_dict({**model.config, "vision_config": vision})
  with pytest.raises(ValueError, match=r"no text_config or vision_config in that of \['T5'\]"):
    clip_dual.CLIPConfig.from_dict({"architectures": ["T5"]})
  with pytest.raises(ValueError, match=r"no folder .*nowhere\n.*hf download"):
    clip_dual.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="with params, found none"):
    clip_dual.save(clip_dual.build(model.config, tokenizer_folder=folder), tmp_path)


def test_config_and_weights_that_do_not_belong_together(pair, tmp_path):
  model, _, _ = pair
  clip_dual.save(model, tmp_path)
  config = {**model.config, "projection_dim": 3}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"2 misshapen: text_projection\.weight"):
    clip_dual.load(tmp_path)
