"""`benchmarks.compiled`: a case from its settings to the page, on a CPU that is called an H100."""

import jax
import pytest

from jaxalign import files
from jaxalign.aot import topology
from jaxalign.benchmarks import compiled_cases, compiled_report
from jaxalign.distributed import sharding


@pytest.fixture(scope="module")
def result():
  described = topology.Topology("h100", jax.devices()[:1], topology.GPUS["h100"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(topology, "find_devices", lambda name: described)
    patch.setattr(sharding, "is_described", lambda mesh: True)
    found, text = compiled_cases.run(
      compiled_cases.CASES["small-ddpo-rollout"],
      topology_name="h100",
      fsdp=1,
      batch=2,
      slices=2,
      changes={
        "process.num_steps": 3, "model.dtype": "float32", "model.param_dtype": "float32"
      },
    )
  assert text.startswith("HloModule")
  return {"case": "small-ddpo-rollout", **found}


def test_a_case_is_read(result):
  assert (result["steps"], result["examples"]) == (3, 2)
  done = result["total"]["operations"]
  assert done == pytest.approx(result["least"], rel=0.02)
  assert result["step"]["operations"] < done / 3
  assert result["temporaries"] > 0 and result["arguments"] < result["memory"]
  assert not result["weight_casts"] and not result["collectives"]


def test_it_is_described_in_lines(result):
  text = compiled_report.describe(result, sources=3)
  assert "process.num_steps=3" in text and "of the least" in text
  assert "convolution" in text and "ms (roofline)" in text


def test_it_fills_the_page(result, tmp_path):
  page, output = tmp_path / "page.md", tmp_path / "results"
  output.mkdir()
  files.write_json(output / compiled_report.file_name(result), result)
  marks = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("compiled", "compiled-kinds")]
  page.write_text("before\n" + "".join(marks))
  compiled_report.fill(page, output)
  text = page.read_text()
  assert "old" not in text and text.count("small-ddpo-rollout") == 2
  assert "| convolution |" in text and text.startswith("before\n")


def test_a_page_without_the_place_is_refused(result, tmp_path):
  page = tmp_path / "page.md"
  page.write_text("nothing\n")
  with pytest.raises(ValueError, match="expected a place marked <!-- compiled -->"):
    compiled_report.fill(page, tmp_path)


@pytest.mark.parametrize("case, changes, expected", [
  ("sd15-dpo-update-full", {}, {"lora.rank": 0, "model.dtype": "bfloat16", "guidance.scale": 5.0}),
  ("sd15-ddpo-update", {"lora.rank": 8}, {"lora.rank": 8, "process.num_steps": 50}),
  ("sdxl-refl-update", {}, {"method.name": "refl", "lora.rank": 4}),
])  # fmt: skip
def test_settings_are_those_of_all_cases_and_then_the_users(case, changes, expected):
  config = compiled_cases.make_config(compiled_cases.CASES[case], changes)
  for key, value in expected.items():
    section, name = key.split(".")
    assert config[section][name] == value


def test_a_change_of_no_section_is_refused():
  with pytest.raises(ValueError, match="expected a section of the config, found none called 'lra'"):
    compiled_cases.make_config(compiled_cases.CASES["small-ddpo-update"], {"lra.rank": 8})
