"""Eight virtual devices do what one does, and continue what others began."""

import itertools
import shutil

import pytest
import small_flows
from device_jobs import CASES, MESHES, assert_close, case_flags, finish, records, start

from jaxalign.training import metrics

# Half of the transitions are clipped here, at a bound that a rounding error can carry one over: the
# norm of a gradient, about 0.1, then changes in its fourth digit.
TOLERANCE = 3e-5

OF_IMAGES = [name for name in CASES if not name.startswith("plans")]
IN_THE_DEFAULT_SUITE = ("full weights", "data 2 x fsdp 4")
PAIRS = [
  pytest.param(*pair, marks=() if pair == IN_THE_DEFAULT_SUITE else pytest.mark.slow)
  for pair in itertools.product(OF_IMAGES, ("data 8", "data 2 x fsdp 4"))
]


def assert_ratio_is_one_at_first(found):
  """The gap itself is within config.exactness, or the run would have ended."""
  assert all(record.get("policy/first_ratio_max_error", 0.0) == 0.0 for record in found)


@pytest.mark.parametrize("name, mesh", PAIRS)
def test_eight_devices_agree_with_one(run_case, name, mesh):
  """One pair in the default suite, the others with `-m slow`."""
  workdirs = run_case(name, ["one device", mesh])
  found, expected = records(workdirs[mesh]), records(workdirs["one device"])
  assert len(expected) == 3 and expected[0]["grad/norm"] > 0.0
  assert_close(found, expected, TOLERANCE)
  assert_ratio_is_one_at_first(found)
  counts = [record["compile/count"] for record in metrics.read(workdirs[mesh])]
  assert counts[1] == counts[-1]  # nor does a checkpoint compile anything


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data 8", "data 2 x fsdp 4"])
def test_rewards_on_eight_devices_agree_with_one(run_case, mesh):
  workdirs = run_case("plans, scored on the mesh", ["one device", mesh], "planner")
  found, expected = records(workdirs[mesh]), records(workdirs["one device"])
  assert expected[1]["eval/planner"] != expected[1]["reward/planner"] != 0.0
  assert_close(found, expected, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full weights", "an adapter"])
def test_eight_devices_agree_with_one_on_the_embedded_model(run_case, name):
  workdirs = run_case(name, MESHES, "shapes")
  expected = records(workdirs["one device"])
  for mesh in ("data 8", "data 2 x fsdp 4"):
    assert_close(records(workdirs[mesh]), expected, TOLERANCE)


XL_CASES = [name for name in OF_IMAGES if name != "rollout pairs"]  # DDPO, DPO and DRaFT


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", TOLERANCE), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", XL_CASES)
def test_xl_on_eight_devices_agrees_with_one(
  name, dtype, tolerance, small_xl, small_model, tmp_path, compilation_cache
):
  more = ("--config.num_iterations=2", f"--config.model.dtype={dtype}")
  if name.startswith("stored pairs"):
    more += (f"--config.data.source={small_model.parent / 'pairs.jsonl'}",)
  for mesh in ("one device", "data 8"):
    devices, flags_of_mesh = MESHES[mesh]
    flags = case_flags(name, tmp_path / mesh, small_xl, *flags_of_mesh, *more)
    finish(start(flags, compilation_cache, devices=devices))
  found, expected = records(tmp_path / "data 8"), records(tmp_path / "one device")
  assert len(expected) == 2 and all(record["grad/norm"] > 0.0 for record in expected)
  assert_close(found, expected, tolerance)
  assert_ratio_is_one_at_first(found)


# Wide enough that its arrays are cut.
HEADS = {"attention_head_dim": 16, "num_attention_heads": 8}
WIDE_FLOWS = {
  "sd3": {**HEADS, "caption_projection_dim": 128},
  "flux1": {**HEADS, "axes_dims_rope": [8, 4, 4]},
  "flux2": {**HEADS, "axes_dims_rope": [4, 4, 4, 4]},
  "z_image": {"dim": 128, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 4, 4]},
  "qwen_image": {**HEADS, "axes_dims_rope": [8, 4, 4]},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", TOLERANCE), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", ["full weights", "an adapter"])
@pytest.mark.parametrize("kind", WIDE_FLOWS)
def test_a_flow_transformer_on_eight_devices_agrees_with_one(
  kind, name, dtype, tolerance, tmp_path, compilation_cache
):
  folder = small_flows.write(kind, tmp_path / "model", transformer=WIDE_FLOWS[kind])
  more = ("--config.num_iterations=2", f"--config.model.dtype={dtype}")
  more += ("--config.model.text_length=20", "--config.model.image_size=(16, 16)")
  more += ("--config.evaluation.num_samples=8",)
  if kind == "flux1":  # is told a scale
    more += ("--config.guidance.scale=3.5",)
  if dtype == "bfloat16":  # rollout and update may round unlike
    more += ("--config.exactness.max_log_prob_gap=1e-3", "--config.exactness.max_share=1.0")
  for mesh, (devices, flags_of_mesh) in MESHES.items():
    flags = case_flags(name, tmp_path / mesh, folder, *flags_of_mesh, *more)
    finish(start(flags, compilation_cache, devices=devices))
  expected = without_roundings(records(tmp_path / "one device"), dtype)
  assert len(expected) == 2 and all(record["grad/norm"] > 0.0 for record in expected)
  for mesh in ("data 8", "data 2 x fsdp 4"):
    found = without_roundings(records(tmp_path / mesh), dtype)
    assert_close(found, expected, tolerance)
    assert_ratio_is_one_at_first(found)


def without_roundings(found, dtype):
  """Rounding errors as measured are another mesh's own, and in bfloat16 so is what they clip."""
  own = ("floor/", *(("policy/clip_frac", "policy/log_prob_gap") if dtype == "bfloat16" else ()))
  return [{k: v for k, v in record.items() if not k.startswith(own)} for record in found]


def test_a_checkpoint_of_eight_devices_continues_on_one(
  run_case, small_model, tmp_path, compilation_cache
):
  """As after a kill in iteration 3: the checkpoint of iteration 2 is the newest."""
  workdirs = run_case("full weights", ["one device", "data 2 x fsdp 4"])
  shutil.copytree(workdirs["data 2 x fsdp 4"], tmp_path / "run")
  for folder in (tmp_path / "run" / "checkpoints").iterdir():
    if folder.name != "2":
      shutil.rmtree(folder)
  flags = case_flags("full weights", tmp_path / "run", small_model)
  finish(start(flags, compilation_cache))
  assert_close(records(tmp_path / "run"), records(workdirs["one device"]), TOLERANCE)


@pytest.mark.parametrize("flags,words", [
  (("--config.mesh.data=3",), "expected data x fsdp = 8, the number of devices, got 3 x 1"),
  (("--config.batch.microbatch=4",), "config.batch.microbatch: expected a multiple of 8"),
])
def test_a_batch_or_mesh_that_does_not_fit_is_refused(
  small_model, tmp_path, compilation_cache, flags, words
):
  all_flags = case_flags("full weights", tmp_path / "run", small_model, *flags)
  job = start(all_flags, compilation_cache, devices=8)
  printed, _ = job.communicate()
  assert job.returncode == 1 and words in printed and "Traceback" not in printed
  assert not (tmp_path / "run").exists()
