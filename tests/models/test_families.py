"""Models by name: each path finds its family, each mistake its near miss."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.models import families
from jaxalign.models.families import gaussian, initialization, planner, stable_diffusion
from jaxalign.models.networks import temporal

MODULE = """
from jaxalign.models.families import gaussian

def shifted(*, by=1.0):
  return gaussian.open_model("gaussian", mean=(by, by), std=(1.0, 1.0))

def wrong():
  return 3
"""


@pytest.fixture
def opened_as_stable_diffusion(monkeypatch):
  """What the family is asked for, in place of opening it."""
  asked = []

  def open_model(path, *, dtype="float32"):
    asked.append((str(path), dtype))

  monkeypatch.setattr(stable_diffusion, "open_model", open_model)
  monkeypatch.setattr(stable_diffusion, "as_model", lambda bundle: "a model", raising=False)
  return asked


def test_embedded_models_by_name():
  assert families.open_model("gaussian", schedule="flow").prediction_type == "velocity"
  assert families.open_model("planner").modality.unit == "plans"


def test_folders_by_the_class_of_their_index(tmp_path):
  model = gaussian.open_model("gaussian", mean=(3.0,), std=(1.0,))
  model.files.save(model.params, tmp_path / "gaussian")
  assert families.open_model(tmp_path / "gaussian").latent_shape == (1,)
  config = temporal.TemporalConfig(horizon=4, width=4, num_layers=1, time_width=2, channel_width=4)
  params = initialization.random_params(jax.random.key(0), planner.param_shapes(config))
  planner.build(config, params).files.save({"denoiser": params}, tmp_path / "planner")
  assert families.open_model(str(tmp_path / "planner")).latent_shape == (4, 2)


def test_the_rest_is_stable_diffusion(opened_as_stable_diffusion, tmp_path):
  save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
  (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
  for path in ("shapes", tmp_path, tmp_path / "model.safetensors"):
    assert families.open_model(path, dtype="bfloat16") == "a model"
    assert opened_as_stable_diffusion[-1] == (str(path), "bfloat16")
  with pytest.raises(ValueError, match=r"config.model: .*dtyp'.*did you mean \"dtype\""):
    families.open_model("shapes", dtyp="bfloat16")
  with pytest.raises(ValueError, match="no model folder"):
    families.open_model(tmp_path / "nowhere")


def test_an_option_of_another_family_is_named():
  with pytest.raises(ValueError, match=r"config.model: .*'remat'.*valid keys: path, dtype, param_"):
    families.open_model("planner", remat="none")


def test_a_family_of_another_package(tmp_path, monkeypatch):
  (tmp_path / "my_families.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  model = families.open_model("my_families:shifted", by=2.0, shapes_only=False)
  np.testing.assert_array_equal(model.params["denoiser"]["mean"], [2.0, 2.0])
  with pytest.raises(ValueError, match=r'model "my_families:shifted".*valid keys: by'):
    families.open_model("my_families:shifted", buy=2.0)
  with pytest.raises(ValueError, match=r"expected it to return a models\.model\.Model, got int"):
    families.open_model("my_families:wrong")
  with pytest.raises(ValueError, match='has no "shift"; did you mean "shifted"'):
    families.open_model("my_families:shift")
