"""Configs and sizes of flow transformers that are odd in one way: read, or refused."""

import jax
import numpy as np
import odd_flows
import pytest
import small_flows


@pytest.mark.parametrize("kind", small_flows.KINDS)
def test_an_image_size_that_packing_does_not_divide_is_refused(sound_flow, kind):
  for size in ((8, 6), (6, 8), (0, 8), (8, -4)):
    words = f"image size: expected multiples of 4 pixels, got {size[0]} x {size[1]}"
    odd_flows.check_refused(words, sound_flow(kind), image_size=size, shapes_only=True)


@pytest.mark.parametrize(("kind", "most"), [("z_image", 1024), ("sd3", 24)])
def test_an_image_larger_than_the_table_of_positions_is_refused(sound_flow, kind, most):
  assert odd_flows.open_model(sound_flow(kind), image_size=(most, most), shapes_only=True)
  words = rf"image size: expected .*at most {most}.*got {most + 4} x 8"
  odd_flows.check_refused(words, sound_flow(kind), image_size=(most + 4, 8), shapes_only=True)


def test_a_size_of_the_config_that_packing_does_not_divide_is_refused(copy_flow):
  folder = copy_flow("sd3")
  odd_flows.change(folder / "transformer" / "config.json", sample_size=7)
  options = {"image_size": None, "shapes_only": True}
  odd_flows.check_refused("image size: expected multiples of 4", folder, **options)


@pytest.mark.parametrize("value", [3, True, {"a": 1}])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_architectures_that_are_no_list_say_nothing(copy_flow, sound_flow, component, value):
  """As of a Stable Diffusion's text encoder."""
  folder = copy_flow("flux1")
  odd_flows.change(folder / component / "config.json", architectures=value)
  odd_flows.check_same(folder, sound_flow("flux1"))


@pytest.mark.parametrize(
  ("kind", "component", "fields", "words"),
  [
    ("flux2", "text_encoder", {"num_hidden_layers": 2}, "at least 3 layers.*num_hidden_layers 2"),
    ("z_image", "text_encoder", {"hidden_size": 16}, "hidden_size of text_encoder, found 8 and 16"),
    ("flux2", "text_encoder", {"hidden_size": 16}, "3 times hidden_size.*found 24 and 16"),
    ("qwen_image", "transformer", {"joint_attention_dim": 9}, "hidden_size.*found 9 and 8"),
    ("flux1", "text_encoder", {"hidden_size": 16}, "pooled_projection_dim == hidden_size of text"),
    ("flux1", "text_encoder_2", {"d_model": 16}, "joint_attention_dim == d_model of text_encoder"),
    ("sd3", "text_encoder_3", {"d_model": 16}, "joint_attention_dim.*== d_model of text_encoder_3"),
    ("sd3", "text_encoder_2", {"hidden_size": 64}, "joint_attention_dim.*hidden_size of both"),
    ("sd3", "text_encoder", {"projection_dim": 7}, "projection_dim of both CLIPs"),
    ("sd3", "text_encoder", {"max_position_embeddings": 9}, "max_position_embeddings"),
    ("flux1", "vae", {"latent_channels": 4}, "in_channels == 4 times vae latent_channels"),
    # FLUX.1-Fill reads an image and a mask beside the latents.
    ("flux1", "transformer", {"in_channels": 72, "out_channels": 12}, "in_channels == 4 times vae"),
    ("flux2", "vae", {"latent_channels": 4}, "in_channels == 4 times vae latent_channels"),
    ("z_image", "vae", {"latent_channels": 4}, "in_channels == vae latent_channels"),
    (
      *("qwen_image", "vae", {"z_dim": 2, "latents_mean": [0, 0], "latents_std": [1, 1]}),
      "in_channels == 4 times vae z_dim",
    ),
    ("flux1", "transformer", {"out_channels": 24}, "out_channels"),
    ("flux2", "transformer", {"out_channels": 24}, "out_channels"),
    ("qwen_image", "transformer", {"out_channels": 4}, "out_channels"),
    ("qwen_image", "transformer", {"patch_size": 1}, "out_channels|patch_size"),
  ],
)
def test_parts_that_do_not_fit_each_other_are_refused(copy_flow, kind, component, fields, words):
  folder = copy_flow(kind)
  if (kind, component) == ("qwen_image", "text_encoder"):
    odd_flows.change_text_config(folder, **fields)
  else:
    odd_flows.change(folder / component / "config.json", **fields)
  odd_flows.check_refused(words, folder, shapes_only=True)


@pytest.mark.parametrize(
  ("kind", "component", "fields"),
  [
    ("flux1", "vae", {"norm_num_groups": None}),
    ("flux1", "vae", {"act_fn": "x" * 5000}),
    ("flux1", "text_encoder", {"hidden_act": "x" * 5000}),
    ("flux1", "text_encoder", {"layer_norm_eps": -1.0}),
    ("flux1", "text_encoder", {"eos_token_id": 2**31}),
    ("flux1", "text_encoder_2", {"layer_norm_epsilon": -1.0}),
    ("z_image", "vae", {"scaling_factor": 0.0}),
    ("z_image", "vae", {"scaling_factor": 10**400}),
  ],
  ids=lambda value: str(value)[:40],
)
def test_values_that_no_network_has_are_refused(copy_flow, kind, component, fields):
  folder = copy_flow(kind)
  odd_flows.change(folder / component / "config.json", **fields)
  odd_flows.check_refused(next(iter(fields)), folder, shapes_only=True)


@pytest.mark.parametrize(
  ("kind", "component", "name"),
  [
    ("flux2", "vae", "batch_norm_eps"),
    ("z_image", "transformer", "t_scale"),
    ("z_image", "vae", "scaling_factor"),
    ("z_image", "vae", "shift_factor"),
  ],
)
def test_a_whole_number_is_a_number_of_any_size(copy_flow, kind, component, name):
  """JAX takes a Python int for one of 32 bits."""
  folder = copy_flow(kind)
  odd_flows.change(folder / component / "config.json", **{name: 2**31})
  model = odd_flows.open_model(folder, shapes_only=True)
  cond = jax.eval_shape(model.condition, model.params, model.tokenize(odd_flows.PROMPT))
  x_0, t = jax.ShapeDtypeStruct((1, *model.latent_shape), np.float32), np.ones(1, np.float32)
  variables = {"params": model.params["denoiser"]}
  assert jax.eval_shape(model.denoise, variables, x_0, t, cond).shape == x_0.shape
  assert jax.eval_shape(model.decode, model.params, x_0).shape[1:] == model.sample_shape


@pytest.mark.parametrize(
  "fields",
  [
    {"shift": "3.0"},
    {"shift": [3.0]},
    {"shift": -1.0},
    {"shift": 0},
    {"base_shift": "0.5"},
    {"base_shift": 1e308},
    {"max_shift": [1.15]},
    {"max_image_seq_len": {}},
    {"max_image_seq_len": 16},  # as base_image_seq_len is: a slope of no end
    {"base_image_seq_len": "256"},
    {"shift_terminal": "0.02"},
    {"shift_terminal": 1.5},
    {"time_shift_type": "x" * 5000},
    {"use_dynamic_shifting": "false"},
    {"num_train_timesteps": 0},
    {"num_train_timesteps": -1000},
    {"num_train_timesteps": 10**12},
  ],
  ids=lambda fields: str(fields)[:40],
)
def test_a_scheduler_that_says_something_else_is_refused(copy_flow, fields):
  folder = copy_flow("qwen_image")
  file = folder / "scheduler" / "scheduler_config.json"
  odd_flows.change(file, **fields)
  if "shift" in fields:
    odd_flows.change(file, use_dynamic_shifting=False)
  (field,) = fields

  def sample():
    model = odd_flows.open_model(folder, shapes_only=True)
    model.make_process(num_steps=2, transition="euler")

  assert field in odd_flows.refusal(sample)


@pytest.mark.parametrize("field", ["base_shift", "max_shift", "max_image_seq_len", "shift"])
def test_null_in_a_scheduler_is_the_default(copy_flow, field):
  folder = copy_flow("qwen_image")
  file = folder / "scheduler" / "scheduler_config.json"

  def table():
    model = odd_flows.open_model(folder, shapes_only=True)
    return model.make_process(num_steps=3, transition="euler").table

  odd_flows.change(file, use_dynamic_shifting=field != "shift", **{field: None})
  of_null = table()
  odd_flows.drop(file, field)
  jax.tree.map(np.testing.assert_array_equal, of_null, table())


@pytest.mark.parametrize(
  "file", ["model_index.json", "vae/config.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize(
  "content", ["[" * 10**5, "1" * 10**4, "\ufeff{}", "", "null"], ids=lambda text: text[:4] or "none"
)
def test_json_that_no_program_writes_is_refused(copy_flow, file, content):
  folder = copy_flow("z_image")
  (folder / file).write_text(content)
  message = odd_flows.refusal(odd_flows.open_model, folder, shapes_only=True)
  assert str((folder / file).parent) in message, message
