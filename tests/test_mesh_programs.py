"""Programs of eight devices: they lower for GPUs and TPUs, and share weights and not activations.

What `mesh_programs` reads in them; the same is read in programs for eight H100 by `pytest -m aot`.
"""

import pytest
from device_jobs import printed_by

MESHES = ("data=8", "fsdp=8", "data=2 x fsdp=4")
ATTENTIONS = 4  # of the network that is lowered: two transformers, positions and texts


@pytest.fixture(scope="module")
def printed(compilation_cache):
  return printed_by("mesh_programs", compilation_cache)


@pytest.fixture(scope="module")
def compiled(printed):
  return printed["compiled"]


@pytest.mark.parametrize("mesh", MESHES)
def test_they_lower_with_fused_attention_of_a_batch_that_is_cut(mesh, printed):
  """Fused attention refuses queries, keys and values that are not cut alike."""
  found = printed["lowered"][mesh]
  assert found["rollout"] == {"fused": ATTENTIONS, "cut": 3 * ATTENTIONS}
  assert found["update"]["fused"] == 2 * ATTENTIONS  # forward and backward
  assert found["update"]["cut"] >= 3 * ATTENTIONS


def test_devices_share_the_work_of_one_and_send_no_activations(compiled):
  right, alone = compiled["right"], compiled["one device"]
  assert 8 * right["operations"] == pytest.approx(alone["operations"], rel=0.01)
  assert 0 < right["largest_sent"] <= right["largest_weight"]


def test_weights_that_are_not_whole_where_they_are_used_would_be_seen(compiled):
  """XLA then cuts activations as the weights are cut, and sends them in every slice."""
  wrong, alone = compiled["weights not whole"], compiled["one device"]
  assert 8 * wrong["operations"] > 1.05 * alone["operations"]
  assert wrong["largest_sent"] > 2 * wrong["largest_weight"]


def test_gradients_are_summed_over_devices_in_float32(compiled):
  assert compiled["right"]["sums"] == ["f32"]


def test_gradients_of_8_bits_would_be_seen(compiled):
  assert "bf16" in compiled["narrow gradients"]["sums"]
