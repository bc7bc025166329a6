"""What breaks silently is found after the first update: in figures by hand, and in a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from device_jobs import on_planner

from jaxalign import train
from jaxalign.distributed import sharding
from jaxalign.training import metrics, self_check

LORA = {"lora": {
  "down": {"attn": {"to_q": {"a": jnp.ones(2), "b": jnp.ones(2)}, "to_k": {"a": jnp.ones(2)}}},
  "up": {"attn": {"to_q": {"a": jnp.ones(2)}}},
}}  # fmt: skip


def test_layers_are_counted_by_name_and_a_target_without_one_fails():
  found = self_check.trained_layers(LORA, r"(to_q|to_k)$")
  assert found.passed and found.text == "adapters on 3 layers (to_q 2, to_k 1)"
  found = self_check.trained_layers(LORA, r"(to_q|to_k|to_v|to_out_0)$")
  assert not found.passed and found.fatal and "none for to_v, to_out_0" in found.text


@pytest.mark.parametrize("targets, names", [
  (r"(to_q|to_k)$", ["to_q", "to_k"]),
  ("to_q", ["to_q"]),
  ("", []),
  (".", []),
  (r"attn2/to_k$", []),  # of any expression but a list of names nothing is claimed
])
def test_a_list_of_names_is_told_from_other_expressions(targets, names):
  assert self_check.alternatives(targets) == names


def test_a_block_without_a_gradient_is_named():
  tx = optax.adamw(0.1, weight_decay=0.1)  # which moves parameters without one too
  params = {"params": {"down": {"w": jnp.ones(3)}, "up": {"w": jnp.ones(3), "b": jnp.ones(1)}}}
  grads = jax.tree.map(jnp.zeros_like, params)
  grads["params"]["up"]["w"] = jnp.array([0.0, 1e-6, 0.0])
  _, state = tx.update(grads, tx.init(params), params)
  found = self_check.gradients((state,), sharding.one_device())
  assert not found.passed and found.text.startswith("gradients in 1 of 2 blocks, none in down")


def test_rewards_that_say_nothing_warn_and_do_not_end_a_run():
  record = {"reward/mean": 0.0, "reward/std": 0.0, "reward/flat_groups": 1.0}
  rewards, groups = self_check.rewards(record)
  assert (rewards.passed, rewards.fatal, groups.passed, groups.fatal) == (False,) * 4
  (rewards, groups) = self_check.rewards({**record, "reward/std": 0.1, "reward/flat_groups": 0.5})
  assert rewards.passed and groups.passed and groups.text == "50% of groups without a spread"
  assert self_check.rewards({"loss/total": 1.0}) == []


def test_the_screen_shows_three_lines_and_each_failure():
  checks = [self_check.Check(str(n), True, f"check {n}") for n in range(5)]
  checks += [self_check.Check("a", False, "bad"), self_check.Check("b", None, "unknown")]
  assert self_check.lines(checks) == [
    "self-check: check 0; check 1",
    "self-check: check 2; check 3",
    "self-check: check 4",
    "self-check FAILED: a: bad",
  ]


@pytest.fixture
def config(load_config):
  return on_planner(load_config("ddpo_planner", "lora,quicktest"))


def test_a_run_reports_and_compiles_nothing_later(config, tmp_path, capsys):
  train.train(config, tmp_path)
  found = json.loads((tmp_path / self_check.FILE).read_text())
  assert {name for name, check in found.items() if not check["passed"]} == set()
  assert found["trained_layers"]["text"].startswith("adapters on 19 layers")
  assert "the reference is the base model, adapters off" in capsys.readouterr().out
  counts = [record["compile/count"] for record in metrics.read(tmp_path)]
  assert counts[0] == counts[1]


def test_a_target_that_matches_nothing_ends_the_run_after_saving_it(config, tmp_path):
  config.lora.targets = "linear_1|liner_2"
  with pytest.raises(ValueError, match=r"self-check: .*none for liner_2(.|\n)*is saved") as error:
    train.train(config, tmp_path)
  assert len(str(error.value).splitlines()) <= 3
  config.self_check.action = "warn"
  train.train(config, tmp_path)  # goes on with what was saved
  assert [record["step"] for record in metrics.read(tmp_path)] == [0, 1]


def flat(samples, records):
  return np.zeros(len(samples))


def test_flat_rewards_are_said_and_the_run_goes_on(config, tmp_path, capsys):
  config.reward.names = (f"{__name__}:flat",)
  train.train(config, tmp_path)
  assert "self-check warns: rewards: " in capsys.readouterr().out
  found = json.loads((tmp_path / self_check.FILE).read_text())
  assert found["gradients"]["passed"] is None and found["samples_moved"]["passed"] is None


def test_a_warm_up_that_has_not_moved_anything_yet_is_no_failure(config, tmp_path):
  config.optim.warmup_steps = 10
  train.train(config, tmp_path)
  found = json.loads((tmp_path / self_check.FILE).read_text())["samples_moved"]
  assert found["passed"] is None and "not moved yet" in found["text"]
