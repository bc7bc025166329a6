"""Every config: it loads, it is complete, and each variant of it changes something."""

import pathlib

import pytest

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_which_flow_it_is_for_and_how_to_run_it(name, load_config):
  assert load_config(name).flow in ("align", "pretrain", "reward_model")
  source = (pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py").read_text()
  assert f"python -m jaxalign.main --config=configs/{name}.py" in source


@pytest.mark.parametrize("name, variant", [
  *[("ddpo", v) for v in ("long", "quicktest", "lora", "full", "per_prompt", "score_function")],
  *[("dpo", v) for v in ("ipo", "lora", "full", "quicktest")],
  *[("d3po", v) for v in ("lora", "quicktest")],
  *[("draft", v) for v in ("whole", "lv", "align_prop", "refl", "lora", "guarded", "quicktest")],
])
def test_each_variant_changes_something_and_is_documented(name, variant, load_config):
  assert load_config(name, variant) != load_config(name)
  source = (pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py").read_text()
  assert f"\n  {variant} " in source.split('"""')[1]


def test_variants_combine_and_unknown_ones_are_named(load_config):
  config = load_config("ddpo", "quicktest,lora")
  assert config.num_iterations == 2 and config.lora.rank == 16
  with pytest.raises(ValueError, match=r"unknown variant 'quick'.*quicktest"):
    load_config("ddpo", "quick")
