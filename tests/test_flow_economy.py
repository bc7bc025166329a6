"""Rollout and update of every flow transformer do little more than they must, as compiled."""

import warnings

import pytest
import small_flows
from test_flow_families import DEPTHS, TARGETS

from jaxalign.benchmarks import economy, workload
from jaxalign.models import families
from jaxalign.models.families import flux2

# Wide enough that products outweigh what is beside them.
HEADS = {"attention_head_dim": 16, "num_attention_heads": 4, "num_layers": 2}
WIDER = {**HEADS, "num_attention_heads": 8}
WIDE = {
  "sd3": {**WIDER, "caption_projection_dim": 128, "pos_embed_max_size": 12},
  "flux1": {**HEADS, "num_single_layers": 2, "axes_dims_rope": [8, 4, 4]},
  "flux2": {**HEADS, "num_single_layers": 2, "axes_dims_rope": [4, 4, 4, 4]},
  "z_image": {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "axes_dims": [8, 4, 4]},
  "qwen_image": {**HEADS, "axes_dims_rope": [8, 4, 4]},
}


@pytest.mark.parametrize("kind", WIDE)
def test_no_program_does_much_more_than_it_must(kind, tmp_path, monkeypatch):
  """A gradient of frozen weights, or a network evaluated twice, would be seen here.

  The logits of attention are made twice, on purpose, which is little of a network this wide.
  """
  monkeypatch.setitem(flux2._DEPTHS, "qwen3", DEPTHS)
  encoder = {"text_encoder": {"num_hidden_layers": 4}} if kind == "flux2" else {}
  folder = small_flows.write(kind, tmp_path / "model", transformer=WIDE[kind], **encoder)
  with warnings.catch_warnings(action="ignore"):
    options = {"image_size": (32, 48), "text_length": 16}
    model = families.open_model(folder, **options)
  config = workload.load_config("ddpo", "lora")
  config.lora.update({"rank": 4, "targets": TARGETS[kind]})
  config.process = {"num_steps": 3, "transition": "flow_sde", "noise_level": 0.7}
  config.guidance.scale = 3.0
  found = economy.of_ddpo(workload.make(config, model), kind)
  ratios = {row.program: round(row.ratio, 3) for row in found}
  assert len(ratios) == 2 and all(0.95 <= ratio <= 1.05 for ratio in ratios.values()), ratios
