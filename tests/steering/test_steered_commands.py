"""`sample` and `evaluate` with a sampler, from the flags to the files; what users get wrong."""

import json
import re

import numpy as np
import pytest
import shipped
from absl import flags
from device_jobs import ROOT

from jaxalign import evaluate, sample, train
from jaxalign.cli import command as command_lib
from jaxalign.evaluation import evaluation as evaluation_lib
from jaxalign.steering import best_of_n

PLAN = '{"start": [-0.9, 0.0], "goal": [0.9, 0.1]}'
BEST_OF_8 = ("--sampler=best_of_n", "--n=8", "--sampler_reward=planner")
ON_PLANNER = (
  "--model=planner", "--rewards=planner", "--prompts=planner/test", "--guidance_scale=1"
)  # fmt: skip
BOUND = best_of_n.kl_bound(8)


def run_command(command, *arguments):
  """Calls the main function of a command with flags, as from a command line."""
  command.main(command_lib.parse(command.define_flags, *arguments))


def drawn(tmp_path, *arguments, model="planner", record=PLAN, unit="plans"):
  output = tmp_path / "drawn"
  given = (f"--model={model}", f"--record={record}", "--guidance_scale=1", *arguments)
  run_command(sample, *given, f"--output={output}", "--output_type=npy")
  return np.load(output / f"{unit}.npy")


@shipped.programs()
def test_sample_draws_the_best_of_n_and_says_how_far_that_is(tmp_path, capsys):
  plain = drawn(tmp_path)
  assert "sampler" not in capsys.readouterr().out
  best = drawn(tmp_path, *BEST_OF_8)
  line = capsys.readouterr().out.splitlines()[0]
  expected = "sampler best_of_n (n 8; rewards planner): KL to the chain at most 1.2044 nats"
  assert line == expected
  one = drawn(tmp_path, "--sampler=best_of_n", "--n=1", "--reward=planner")
  np.testing.assert_array_equal(one, plain)
  assert best.shape == plain.shape and np.abs(best - plain).max() > 1e-3
  again = drawn(tmp_path, *BEST_OF_8)
  np.testing.assert_array_equal(best, again)


def test_several_rewards_are_added(tmp_path, capsys):
  both = "planner_smoothness,planner_length"
  drawn(tmp_path, "--sampler=best_of_n", "--n=4", f"--reward={both}")
  assert "rewards planner_smoothness, planner_length)" in capsys.readouterr().out


def test_sample_takes_a_sampler_of_ones_own(tmp_path, monkeypatch, capsys):
  (tmp_path / "my_samplers.py").write_text("""
import jax.numpy as jnp
from jaxalign import steering

def fixed(pipeline, *, at):
  def sample(key, variables, frozen, inputs, table):
    x_0 = jnp.full(inputs.x_T.shape, at)
    return steering.Sampled(None, inputs.cond, pipeline.decode(frozen, x_0), x_0)

  return steering.Sampler(sample)
""")
  monkeypatch.syspath_prepend(tmp_path)
  own = ("--sampler=my_samplers:fixed", '--sampler_args={"at": 0.5}')
  points = drawn(tmp_path, *own, model="gaussian", record="{}", unit="points")
  np.testing.assert_array_equal(points, np.full((1, 2), 0.5))
  expected = "sampler my_samplers:fixed (at 0.5): KL to the chain not known"
  assert capsys.readouterr().out.startswith(expected)


def test_the_sampler_of_the_documentation_does_what_it_says(tmp_path, monkeypatch):
  """With noise in all steps it is the chain, and in none the one that has none."""
  (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "steering.md").read_text(), re.S)
  (tmp_path / "documented.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  world = {"model": "gaussian", "record": "{}", "unit": "points"}
  for share, eta in ((1.0, 1.0), (0.0, 0.0)):
    given = ("--sampler=documented:quiet_end", f'--sampler_args={{"share": {share}}}', "--eta=1")
    expected = drawn(tmp_path, f"--eta={eta}", **world)
    np.testing.assert_allclose(drawn(tmp_path, *given, **world), expected, atol=1e-5)
  assert np.abs(drawn(tmp_path, "--eta=1", **world) - expected).max() > 1e-3


def means(printed):
  """`{name: value}` of what evaluate prints of a model."""
  rows = [line.split() for line in printed.splitlines() if not line.startswith("sampler")]
  return {name: float(value) for name, value in rows}


def test_evaluate_a_model_with_a_sampler(capsys):
  """48 plans: of eight each the best is far above the chain's, and more of them arrive."""
  given = (*ON_PLANNER, "--rewards=planner,planner_success", "--num_images=48")
  run_command(evaluate, *given)
  plain = capsys.readouterr().out
  run_command(evaluate, *given, *BEST_OF_8)
  best = capsys.readouterr().out
  assert "sampler" not in plain and best.count("at most 1.2044 nats") == 1
  plain, best = means(plain), means(best)
  assert best["planner"] > plain["planner"] + 0.1
  assert best["planner_success"] > plain["planner_success"] + 0.15


@pytest.fixture(scope="module")
def workdir(load_config, tmp_path_factory):
  """Of a finished run of two iterations."""
  config = load_config("ddpo_planner", "quicktest")
  folder = tmp_path_factory.mktemp("planner")
  train.train(config, folder)
  return folder


def reported(workdir):
  return json.loads((workdir / "evaluation.json").read_text())


def test_a_run_is_evaluated_with_a_sampler_and_its_report_says_so(workdir, capsys):
  """Base and aligned model alike; the trajectory KL is not defined, and so null."""
  assert reported(workdir)["sampler"] == {"name": "chain", "kl_bound": 0.0}
  run_command(evaluate, f"--workdir={workdir}", "--num_images=24")
  plain, shown = reported(workdir), capsys.readouterr().out
  assert plain["sampler"] == {"name": "chain", "kl_bound": 0.0} and plain["kl_to_ref"] is not None
  assert "sampler" not in shown
  run_command(evaluate, f"--workdir={workdir}", "--num_images=24", *BEST_OF_8)
  best, shown = reported(workdir), capsys.readouterr().out
  assert best["sampler"] == {
    "name": "best_of_n", "n": 8, "rewards": ["planner"], "kl_bound": pytest.approx(BOUND)
  }  # fmt: skip
  for side in ("base", "aligned"):
    assert best["rewards"]["planner"][side] > plain["rewards"]["planner"][side] + 0.05
  assert best["kl_to_ref"] is None and "none: best_of_n keeps no trajectory" in shown
  assert "sampler best_of_n (n 8; rewards planner): KL to the chain at most 1.2044 nats" in shown


def test_a_run_is_sampled_with_a_sampler(workdir, tmp_path, capsys):
  given = (f"--workdir={workdir}", f"--record={PLAN}", f"--output={tmp_path}")
  run_command(sample, *given, *BEST_OF_8)
  lines = capsys.readouterr().out.splitlines()
  assert "best_of_n (n 8; rewards planner)" in lines[1]
  assert np.isfinite(np.load(lines[2])).all()


def test_an_evaluation_of_a_config_may_have_a_sampler_of_its_own():
  """Made once for a system, so that its program is compiled once, for validation and test."""
  section = {
    "num_samples": 4, "seed": 0, "microbatch": 4, "features": "default", "rewards": ("planner",)
  }  # fmt: skip
  made = evaluation_lib.make_evaluations(
    source="planner/test",
    validation="planner/validation",
    sampler={"name": "best_of_n", "n": 2},
    sampler_rewards=("planner",),
    **section,
  )
  plain = evaluation_lib.make_evaluation(source="planner/test", **section)
  assert made.test.settings["sampler"] == {"name": "best_of_n", "n": 2, "rewards": ["planner"]}
  assert "sampler" not in plain.settings  # as evaluations that were recorded before
  given = ("--model=planner", "--guidance_scale=1")
  sys, params = sample.load_system(command_lib.parse(sample.define_flags, *given))
  assert plain.steered(sys) is sys
  steered = made.test.steered(sys)
  assert steered.sampler.settings["n"] == 2
  assert made.validation.steered(sys) is steered and made.test.steered(sys) is steered
  records, samples, _ = made.test.sample(sys, params, num_samples=4)
  expected, _ = steered.sample_all(params, records, microbatch=4, **made.test.noise)
  np.testing.assert_array_equal(samples, expected)


WRONG = [
  (("--sampler=best_off_n", "--n=4"), r'unknown sampler "best_off_n"; did you mean "best_of_n"'),
  (("--sampler=best_of_n", "--n=0", "--sampler_reward=planner"), "at least 1, got 0"),
  (("--sampler=best_of_n", "--sampler_reward=planner"), "missing a required argument: 'n'"),
  (("--sampler=best_of_n", "--n=4"), r"found none\nname one: --sampler_reward=NAME"),
  (
    ("--sampler=best_of_n", "--n=4", "--sampler_reward=planner_success,shapes,planner"),
    "found planner_success, shapes on the host only",
  ),
  (("--sampler=best_of_n", "--n=4", "--sampler_reward=plannr"), 'did you mean "planner'),
  (("--n=4",), "--n: expected --sampler=NAME with it"),
  (("--reward=planner",), "--sampler_reward: expected --sampler=NAME with it"),
  (("--sampler=chain", "--reward=planner"), "the chain goes by no reward"),
  (("--sampler=chain", "--n=4"), 'sampler "chain": .*valid keys: none'),
  (("--sampler=best_of_n", "--sampler_args=[4]"), "--sampler_args: expected a JSON object"),
]


@pytest.mark.parametrize("given, message", WRONG)
@pytest.mark.parametrize("command", [sample, evaluate])
def test_what_users_get_wrong(command, given, message):
  own = ON_PLANNER if command is evaluate else ("--model=planner", f"--record={PLAN}")
  with pytest.raises((ValueError, flags.Error), match=message) as error:
    run_command(command, *own, *given)
  assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("flag", ["--num_steps=4", "--guidance_scale=2", "--eta=1", "--seed=3"])
def test_a_run_is_evaluated_as_its_config_says(flag, workdir):
  with pytest.raises(flags.Error, match="expected --model with it; a run"):
    run_command(evaluate, f"--workdir={workdir}", flag)
