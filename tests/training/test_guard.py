"""The guard's verdicts on histories written by hand, and what it keeps."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.training import checkpoint, guard
from jaxalign.training.state import init_state

BASE = {"eval/gold": 0.3, "eval/kl_to_ref": 0.0, "eval/diversity": 0.8}
BOUNDS = {
  "gold": "gold", "patience": 2, "kl_budget": 0.0, "diversity_floor": 0.0, "action": "stop"
}  # fmt: skip


def make(**changes):
  section = {"rewards": ("gold", "proxy"), "every": 5, "kl": True, "has_kl": True}
  return guard.make(**{**BOUNDS, **changes}, **section)


def history(*golds, kl=1.0, diversity=0.8):
  return [
    {"step": 5 * i + 4, "eval/gold": g, "eval/kl_to_ref": kl, "eval/diversity": diversity}
    for i, g in enumerate(golds)
  ]


def test_a_rising_gold_reward_is_the_best_and_no_reason_to_stop():
  assert make().judge(history(0.35, 0.4), BASE) == guard.Verdict((), 10, True, False)


def test_a_falling_gold_reward_is_borne_for_the_patience():
  one = make().judge(history(0.4, 0.35), BASE)
  assert one == guard.Verdict((), 5, False, False)
  two = make().judge(history(0.4, 0.35, 0.39), BASE)
  assert two.stop and two.best_step == 5 and not two.is_best
  assert two.warnings == (
    "the gold reward gold is 0.390 and has not passed 0.400, of iteration 5, for 2 evaluations",
  )


def test_a_new_best_forgives():
  assert make().judge(history(0.4, 0.35, 0.41, 0.2), BASE) == guard.Verdict((), 15, False, False)


def test_a_run_that_never_passes_the_base_model_keeps_the_base_model():
  verdict = make().judge(history(0.29, 0.3), BASE)
  assert verdict.stop and verdict.best_step == 0


def test_the_kl_budget_and_the_floor_of_diversity_name_their_figures():
  bounded = make(kl_budget=20.0, diversity_floor=0.5, gold="gold", action="warn")
  assert not bounded.judge(history(0.4, kl=20.0, diversity=0.4), BASE).warnings
  verdict = bounded.judge(history(0.4, kl=20.1, diversity=0.39), BASE)
  assert not verdict.stop and verdict.is_best
  assert verdict.warnings == (
    "the trajectory KL to the reference is 20.1 nats, above the budget of 20",
    "the diversity is 0.390, below 0.400, which is 0.5 of the base model's",
  )
  assert make(kl_budget=20.0).judge(history(0.4, kl=21.0), BASE).stop


def test_a_budget_says_nothing_of_evaluations_that_measured_no_kl():
  records = [{k: v for k, v in r.items() if k != "eval/kl_to_ref"} for r in history(0.4)]
  assert not make(kl_budget=20.0).judge(records, BASE).warnings


def test_without_a_gold_reward_the_other_bounds_still_warn():
  bounded = make(gold="", kl_budget=20.0, action="warn")
  assert len(bounded.judge(history(0.1, kl=21.0), BASE).warnings) == 1


@pytest.mark.parametrize("changes, every, message", [
  ({"action": "halt"}, 5, "expected one of off, warn, stop; got 'halt'"),
  ({}, 0, "needs evaluations during the run"),
  ({"gold": "golden"}, 5, "expected one of the evaluation's rewards, gold, proxy; got 'golden'"),
  ({"gold": ""}, 5, "keeps the best checkpoint"),
  ({"patience": 0}, 5, "patience of at least 1"),
  ({"kl_budget": -1.0}, 5, "kl_budget of at least 0"),
  ({"kl_budget": 1.0}, 5, "evaluations that do not measure it\nset config.evaluation.kl to True"),
  ({"diversity_floor": 1.5}, 5, "from 0 to 1"),
])
def test_a_guard_that_could_see_nothing_is_refused(changes, every, message):
  with pytest.raises(ValueError, match=message):
    section = {"rewards": ("gold", "proxy"), "every": every, "kl": False, "has_kl": True}
    guard.make(**{**BOUNDS, **changes}, **section)


def test_a_budget_of_a_kl_that_no_step_has_is_refused():
  arguments = {**BOUNDS, "rewards": ("gold",), "every": 5, "kl": True, "has_kl": False}
  assert guard.make(**arguments) is not None
  with pytest.raises(ValueError, match=r"kl_budget: expected 0, .* got 0.5\nset it to 0, or raise"):
    guard.make(**{**arguments, "kl_budget": 0.5})


def test_off_is_no_guard_whatever_else_it_says(tmp_path):
  nothing = {"rewards": (), "every": 0, "kl": False, "has_kl": True}
  assert guard.make(**{**BOUNDS, "action": "off"}, **nothing) is None
  watch = guard.Watch(None, {}, tmp_path, 0, {})
  assert watch.verdict() == watch.look(initial(), {}) == guard.UNWATCHED
  watch.close()
  assert not list(tmp_path.iterdir())


def initial():
  return init_state({"w": jnp.full(2, -1.0)}, optax.sgd(1.0))


def state_at(step, value):
  return dataclasses.replace(
    initial(), step=np.int32(step), params={"w": jnp.full(2, value)}
  )


SETTINGS = {"prompts": ["a circle", "a square"], "seed": 0, "process": {"eta": 1.0}}


def watched(workdir, *golds, start=0, settings=SETTINGS, close=True, **bounds):
  """`(watch, its last verdict)` after evaluations at every fifth iteration after `start`; the
  state of each is full of its iteration.
  """
  watch = guard.Watch(make(**bounds), BASE, workdir, start, settings)
  verdict = watch.verdict()
  for number, record in enumerate(history(*golds)):
    step = start + 5 * number + 5
    verdict = watch.look(state_at(step, float(step)), {**record, "loss/total": 1.0})
  if close:
    watch.close()
  return watch, verdict


def test_the_watch_keeps_the_best_state_and_comes_to_the_same_verdict_again(tmp_path):
  assert guard.kept(tmp_path) is None
  watch, verdict = watched(tmp_path, 0.4, 0.5, 0.45, 0.2, close=False)
  assert verdict.stop and verdict.best_step == 10
  assert guard.kept(tmp_path) == guard.Kept(10, ended=False)
  best = watch.end(initial())
  assert int(best.step) == 10 and best.params["w"][0] == 10.0
  assert guard.kept(tmp_path) == guard.Kept(10, ended=True)
  watch.close()
  step, saved = checkpoint.read_latest(tmp_path, checkpoint.BEST)
  assert step == 10 and saved["params"]["w"][0] == 10.0
  # Started again after 20 iterations, and after 15: what a killed run saw beyond does not count.
  assert watched(tmp_path, start=20)[1] == verdict
  assert guard.kept(tmp_path).ended
  assert watched(tmp_path, start=15)[1] == guard.Verdict((), 10, False, False)
  assert not guard.kept(tmp_path).ended  # it goes on


def test_a_run_that_goes_on_without_its_guard_has_not_ended(tmp_path):
  watch, _ = watched(tmp_path, 0.4, 0.3, 0.3, close=False)
  watch.end(initial())
  watch.close()
  assert guard.kept(tmp_path).ended
  guard.Watch(None, {}, tmp_path, 15, {})
  assert guard.kept(tmp_path) == guard.Kept(0, ended=False)


def test_the_watch_falls_back_to_the_base_model(tmp_path):
  watch, verdict = watched(tmp_path, 0.2, 0.2, close=False)
  assert verdict.stop and watch.end(initial()).params["w"][0] == -1.0
  assert guard.kept(tmp_path) == guard.Kept(0, ended=True)
  watch.close()


def test_switched_on_at_a_restart_it_knows_only_what_it_sees(tmp_path, capsys):
  """Evaluations before it were of states that nobody has kept: they cannot be the best."""
  earlier = history(0.4, 0.6)
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in earlier))
  watch, verdict = watched(tmp_path, 0.5, 0.45, 0.45, start=10, close=False)
  assert "guard: it watches from iteration 10 on" in capsys.readouterr().out
  assert verdict.stop and verdict.best_step == 15
  assert int(watch.end(initial()).step) == 15
  watch.close()


def test_a_gold_reward_that_earlier_evaluations_did_not_have(tmp_path):
  old = {**SETTINGS, "rewards": ["proxy"]}
  watch = guard.Watch(make(gold="proxy"), {"eval/proxy": 0.1}, tmp_path, 0, old)
  watch.look(state_at(5, 5.0), {"eval/proxy": 0.9})
  watch.close()
  new = {**SETTINGS, "rewards": ["proxy", "gold"]}
  watch, verdict = watched(tmp_path, 0.2, 0.2, start=5, settings=new, close=False)
  assert verdict.stop and verdict.best_step == 0  # and not the state that was best on another
  assert watch.end(initial()).params["w"][0] == -1.0
  watch.close()


@pytest.mark.parametrize("changed", [
  {"prompts": ["a circle"]}, {"seed": 1}, {"process": {"eta": 0.5}}, {"rewards": ["gold"]},
])
def test_evaluations_with_other_settings_do_not_count(changed, tmp_path):
  watched(tmp_path, 0.9, 0.4)
  assert watched(tmp_path, start=10)[1].best_step == 5  # nothing has changed
  _, verdict = watched(tmp_path, 0.5, start=10, settings={**SETTINGS, **changed})
  assert verdict == guard.Verdict((), 15, True, False)


def test_evaluations_judged_by_another_gold_reward_do_not_count(tmp_path):
  watched(tmp_path, 0.9, 0.4)
  watch = guard.Watch(make(gold="proxy"), {"eval/proxy": 0.1}, tmp_path, 10, SETTINGS)
  assert watch.verdict() == guard.UNWATCHED
  watch.close()


def test_a_kept_state_that_is_not_the_one_of_the_verdict_is_refused(tmp_path):
  watch, _ = watched(tmp_path, 0.9, 0.4, close=False)
  watch._best.save(20, state_at(20, 20.0), force=True)  # as of a run that was killed right there
  with pytest.raises(ValueError, match=r"iteration 5 in .*best, found 20\n.*guard\.json") as error:
    watch.end(initial())
  assert "action=off" in str(error.value) and len(str(error.value).splitlines()) <= 3
  assert not guard.kept(tmp_path).ended
  watch.close()


def test_a_floor_of_diversity_wants_several_images_of_a_prompt(tmp_path):
  base = {**BASE, "eval/diversity": None}
  with pytest.raises(ValueError, match="expected several samples of a record"):
    guard.Watch(make(diversity_floor=0.5), base, tmp_path, 0, SETTINGS)
