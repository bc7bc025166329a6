"""Every config: it loads, it is complete, and each variant of it changes something.

Those of the published models are also run, in `quicktest` size, on small models of their kind.
"""

import json
import os
import pathlib
import re

import pytest
import small_flows
from ml_collections import config_dict

from configs import common
from jaxalign import train
from jaxalign.benchmarks import models
from jaxalign.cli.configs import SHARED
from jaxalign.training import metrics

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted({path.stem for path in FOLDER.glob("*.py")} - set(SHARED))
GOLDEN = pathlib.Path(__file__).parent / "golden" / "configs.json"
# Variants that change the same sections, so that their order counts.
COMBINED = {
  "ddpo": "lora,quicktest",
  "d3po": "lora,quicktest",
  "dpo": "ipo,lora",
  "draft": "guarded,quicktest",
  "ddpo_sd15": "full,quicktest",
  "ddpo_sdxl": "full,quicktest",
  "dpo_sd15": "lora,quicktest",
  "dpo_sdxl": "lora,quicktest",
  "draft_sd15": "lv,quicktest",
}


def flatten(config, prefix=""):
  """{dotted path: `repr` of the value}, which tells 1 from 1.0 and a tuple from a list."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = repr(value)
  return flat


def resolve(name, load_config):
  """All values of a config, at "", and what each variant makes of them; None is no such field."""
  base = flatten(load_config(name))
  found = {"": base}
  for variant in filter(None, (*load_config.variants(name), COMBINED.get(name))):
    changed = flatten(load_config(name, variant))
    paths = sorted(p for p in {*base, *changed} if base.get(p) != changed.get(p))
    found[variant] = {path: changed.get(path) for path in paths}
  return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_and_its_variants_have_the_values_that_were_written_down(name, load_config):
  """A change that is meant is written down by this test with WRITE_GOLDEN=1 in the environment."""
  found = resolve(name, load_config)
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  if os.environ.get("WRITE_GOLDEN"):
    golden[name] = found
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
  assert found == golden[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_which_flow_it_is_for_and_how_to_run_it(name, load_config):
  assert load_config(name).flow in ("align", "pretrain", "reward_model")
  source = (FOLDER / f"{name}.py").read_text()
  assert f"python -m jaxalign.main --config={name}" in source


@pytest.mark.parametrize("name", CONFIGS)
def test_each_variant_changes_something_and_is_documented(name, load_config):
  variants = load_config.variants(name)
  assert all(load_config(name, variant) != load_config(name) for variant in variants)
  docstring = (FOLDER / f"{name}.py").read_text().split('"""')[1]
  documented = docstring.partition(f"\nVariants, `--config={name}:NAME[,NAME]`:\n")[2]
  assert sorted(re.findall(r"^  (\w+)  +\S", documented, re.MULTILINE)) == sorted(variants)
  if variants:
    expected = rf"configs/{name}\.py: unknown variant 'quick'; known: .*quicktest"
    with pytest.raises(ValueError, match=expected):
      load_config(name, "quick")


def test_variants_combine(load_config):
  config = load_config("ddpo", "quicktest,lora")
  assert config.num_iterations == 2 and config.lora.rank == 16


def test_a_variant_sets_what_flags_would():
  config = config_dict.ConfigDict({"seed": 0, "method": {"name": "ddpo", "clip_range": 0.1}})
  variants = {
    "seeded": {"seed": 1, "method.clip_range": 0.2},
    "other": {"method": {"name": "dpo", "beta": 1.0}},
    "wrong_field": {"method.clip_rang": 0.2},
    "wrong_section": {"metod.clip_range": 0.2},
  }

  def change(variant):
    return common.with_variants(config.copy_and_resolve_references(), "a.py", variant, variants)

  assert change("") == config
  assert change("seeded").to_dict() == {"seed": 1, "method": {"name": "ddpo", "clip_range": 0.2}}
  assert change("seeded,other").to_dict() == {"seed": 1, "method": {"name": "dpo", "beta": 1.0}}
  assert not change("other").is_locked and not change("other").method.is_locked
  with pytest.raises(KeyError, match="clip_range"):
    change("wrong_field")
  with pytest.raises(KeyError, match="method"):
    change("wrong_section")


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_weights_and_adapters_take_the_form_that_loses_nothing(name, load_config):
  """In every variant: half the memory where the UNet computes in bfloat16; adapters that are
  exact, but for the method and precision whose merged ones were measured (docs/devices.md).
  """
  base = load_config(name)
  if base.flow != "align" or "dtype" not in base.model:
    return
  form = "merged" if (base.method.name, base.model.dtype) == ("ddpo", "bfloat16") else "side"
  variants = load_config.variants(name)
  assert variants
  small = models.build("small", random_params=False)
  for config in (base, *(load_config(name, variant) for variant in variants)):
    assert config.lora.form == form
    assert config.model.param_dtype == config.model.dtype
    known = {key: config.model[key] for key in ("dtype", "param_dtype", "remat")}
    small.with_compute(**known)


PUBLISHED = {
  "ddpo_sd15": "small_model",
  "dpo_sd15": "small_model",
  "draft_sd15": "small_model",
  "ddpo_sdxl": "small_xl",
  "dpo_sdxl": "small_xl",
}
# Configs of flow transformers, by what of `small_flows` stands in for the model.
FLOWS = {
  "flow_grpo_sd35": "sd3",
  "nft_sd35": "sd3",
  "dpo_sd35": "sd3",
  "flow_grpo_klein": "flux2",
  "dpo_klein": "flux2",
  "flow_grpo_zimage": "z_image",
  "dpo_zimage": "z_image",
  "flow_grpo_qwen_image": "qwen_image",
  "dpo_qwen_image": "qwen_image",
}


def quick_published(name, load_config, model, folder):
  """The config in `quicktest` size with the flags of its command."""
  prompts = folder / "prompts.txt"
  prompts.write_text("a red circle\na blue square\n")
  config = load_config(name, "quicktest")
  config.model.path = str(model)
  config.evaluation.source = str(prompts)
  config.data.source = str(prompts)
  learned = ({"path": "shapes"},)  # in the place of PickScore's folder
  if "kwargs" in config.evaluation:
    config.evaluation.kwargs = learned
  if name in FLOWS:
    config.model.update({"image_size": (16, 16), "text_length": 20})
    config.process.num_steps = 3
  if config.get("reward", {}).get("names") == ("clip",):
    config.reward.kwargs = learned
  return config


# The default suite trains an XL by DDPO (tests/test_export.py), and other files each method.
@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, *FLOWS])
def test_a_config_of_a_published_model_runs(name, load_config, pairs_file, tmp_path, request):
  if name in FLOWS:
    model = small_flows.write(FLOWS[name], tmp_path / "model")
  else:
    model = request.getfixturevalue(PUBLISHED[name])
  config = quick_published(name, load_config, model, tmp_path)
  if config.method.name == "dpo":
    config.data.update({"source": str(pairs_file), "max_bad_fraction": 0.2})
  assert config.model.dtype == "bfloat16"
  train.train(config, tmp_path / "run")
  written = metrics.read(tmp_path / "run")
  assert [record["step"] for record in written] == [0, 1]
  assert all(record["grad/norm"] > 0 for record in written)
  assert written[0].get("policy/first_ratio_max_error", 0.0) == 0.0
  assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["num_samples"] == 2
