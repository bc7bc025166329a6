"""Benchmarks: counts are exact, programs do little more than they must, refusals are clear."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxalign.aot import flops
from jaxalign.benchmarks import economy, measure, models, report
from jaxalign.models.networks import products

ROWS, IN, HIDDEN, OUT = 6, 8, 16, 4


def two_layers(params, x):
  return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


@pytest.fixture
def params():
  shapes = {"first": (IN, HIDDEN), "second": (HIDDEN, OUT)}
  return {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}


FIRST, SECOND = 2 * ROWS * IN * HIDDEN, 2 * ROWS * HIDDEN * OUT


@pytest.mark.parametrize("chosen, backward", [
  ({}, 0),
  ({"trained": {"first", "second"}}, FIRST + 2 * SECOND),
  ({"trained": {"second"}}, SECOND),
  ({"through_input": True}, FIRST + SECOND),
  # Rank 2 at the first layer: both factors of x @ a @ b but x, and what the second layer passes on.
  ({"adapted": {"first"}, "rank": 2}, SECOND + 2 * ROWS * 2 * (IN + 2 * HIDDEN)),
])
def test_the_least_work_of_a_gradient(chosen, backward, params):
  counted = flops.minimum(two_layers, params, jnp.ones((ROWS, IN)), **chosen)
  adapter = 2 * ROWS * 2 * (IN + HIDDEN) if "rank" in chosen else 0
  assert (counted.forward, counted.backward) == (FIRST + SECOND + adapter, backward)


def test_a_program_without_waste_is_counted_as_the_least(params):
  x = jnp.ones((ROWS, IN))
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(two_layers(params, x)))))
  text = gradient.lower(params).compile().as_text()
  # The last layer's own output is only needed for its sine's derivative, and is.
  least = flops.minimum(two_layers, params, x, trained={"first", "second"})
  assert flops.compiled(text) == least.gradient


@pytest.mark.parametrize("stride, size", [(1, 8), (2, 4)])
def test_convolutions_and_their_gradients_are_counted_alike(stride, size):
  x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
  once = 2 * (2 * size * size * 5) * (3 * 3 * 3)

  def loss(x, kernel):
    return jnp.sum(jnp.sin(products.convolve(x, kernel, stride, ((1, 1), (1, 1)))))

  text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()
  assert flops.compiled(text) == 3 * once


def test_no_program_does_much_more_than_it_must(monkeypatch):
  """A gradient of frozen weights, or a network evaluated twice, would be seen here."""
  small = models.CONFIGS["small"]
  # One resolution of its two, and else all of its layers.
  unet = {
    **small["unet"],
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
  }
  monkeypatch.setitem(models.CONFIGS, "least", {**small, "unet": unet})
  found = [
    row for of_method in (economy.ddpo, economy.dpo, economy.draft)
    for row in of_method("least", "lora")
  ]  # fmt: skip
  assert len(found) == 6
  ratios = {row.program: round(row.ratio, 3) for row in found}
  assert all(0.95 <= ratio <= 1.05 for ratio in ratios.values()), ratios


@pytest.mark.slow  # a gradient of all weights has less to waste
def test_no_program_does_much_more_than_it_must_where_all_weights_are_trained():
  found = [row for of_method in (economy.ddpo, economy.dpo, economy.draft)
           for row in of_method("small", "full")]  # fmt: skip
  assert all(0.95 <= row.ratio <= 1.05 for row in found), found


@pytest.mark.parametrize("name", models.CONFIGS)
def test_every_model_that_is_measured_reads_texts(name):
  model = models.build(name, random_params=False)
  ids = model.tokenize(["a red circle", ""])
  assert ids.shape[-1] == model.configs["text_encoder"]["max_position_embeddings"]
  assert ids.max() < model.configs["text_encoder"]["vocab_size"]


def test_sides_take_turns_and_ratios_are_ours_over_theirs(tmp_path):
  side = """
import time
from jaxalign.benchmarks import measure
measure.serve({{"a": lambda: time.sleep({}) or 2.0}})
"""
  sides = [
    measure.Side(name, [sys.executable, "-c", side.format(seconds)], tmp_path / name, {})
    for name, seconds in (("jaxalign", 0.04), ("torch", 0.02))
  ]
  try:
    found = measure.interleave(sides, rounds=3)
  finally:
    for running in sides:
      running.end()
  rows = {row["side"]: row for row in measure.summarize(found, "jaxalign")}
  assert rows["jaxalign"]["ratio_best"] == 1.0
  assert rows["torch"]["ratio_best"] > 1.0 and rows["torch"]["value"] == 2.0
  assert len(found["a"]["torch"]["seconds"]) == 3


def test_a_side_that_fails_is_named_with_its_last_words(tmp_path):
  with pytest.raises(ValueError, match=r"the side torch ended: .*no such luck"):
    command = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    measure.Side("torch", command, tmp_path / "log", {})


def command(*given):
  run = [sys.executable, "-m", "jaxalign.benchmarks.throughput", *given]
  done = subprocess.run(run, capture_output=True, text=True, check=False)
  return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(measure.environment()["gpu"] != "none", reason="this machine has a GPU")
def test_a_gpu_case_is_refused_without_a_gpu(tmp_path):
  status, printed = command("--case=sd15-rollout-h200", f"--output={tmp_path}")
  assert status != 0 and "expected an NVIDIA GPU, found none" in printed
  assert "Traceback" not in printed


def test_results_fill_the_page(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- hlo-economy -->\nold\n<!-- /hlo-economy -->\nafter\n")
  row = economy.Row("DDPO: rollout", 2e6, 1.9e6, 0)._asdict() | {"ratio": 2 / 1.9}
  result = {"case": "hlo-economy", "environment": measure.environment(), "economy": [row]}
  (tmp_path / "hlo-economy.json").write_text(json.dumps(result))
  report.fill(page, tmp_path)
  text = page.read_text()
  assert "| DDPO: rollout | 2.0 | 1.9 | 1.053 |" in text and "old" not in text
  assert text.startswith("before\n") and text.endswith("after\n")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unet-fwd-cpu", "unet-grad-cpu", "ddpo-epoch-cpu"])
def test_a_cpu_case_runs_and_its_sides_agree(case, tmp_path):
  flags = (f"--case={case}", "--small", "--rounds=1", "--sides=jaxalign,torch")
  status, printed = command(*flags, f"--output={tmp_path}")
  assert status == 0, printed
  result = json.loads((tmp_path / f"{case}.json").read_text())
  values = {}
  for row in result["rows"]:
    values.setdefault(row["variant"], {})[row["side"]] = row["value"]
  for variant, sides in values.items():
    if variant != "epoch":  # each side draws its own noise
      assert sides["torch"] == pytest.approx(sides["jaxalign"], rel=1e-4)
