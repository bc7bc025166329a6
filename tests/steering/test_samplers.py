"""The contract of samplers: pure, traced once, with trajectories or without; from anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model

from jaxalign import steering, streams, system
from jaxalign.evaluation import precision
from jaxalign.rewards import DeviceReward, combine
from jaxalign.steering import SAMPLERS, Sampler

KWARGS = {"chain": {}, "best_of_n": {"n": 3}}  # of each sampler
NAME = streams.number("rollout")
PROCESS = {"transition": "ddim", "num_steps": 3, "eta": 1.0}
RECORDS = [{"prompt": "x" * length} for length in (1, 2, 5)]


def red(*, shift=0.5) -> DeviceReward:
  """How red a picture is, above a shift, a parameter; times the length of its text."""
  return DeviceReward(
    "red",
    {"shift": jnp.float32(shift)},
    lambda records: np.array([len(record["prompt"]) for record in records], np.float32),
    lambda params, images, query: query * (images[..., 0].mean((1, 2)) - params["shift"]),
  )


def rewards():
  return combine.make_total((f"{__name__}:red",))


def make(sampler, model=None, total=None):
  return system.from_model(
    model or toy_model.make(),
    seed=0,
    lora=system.NO_LORA,
    process=PROCESS,
    guidance={"scale": 2.0},
    sampler=sampler,
    rewards=total,
  )


def named(name):
  return {"name": name, **KWARGS[name]}


def sample(sys, *path, tokens=None, params=None, table=None):
  tokens = sys.tokenize(RECORDS) if tokens is None else tokens
  given = (sys.policy.params if params is None else params, sys.frozen, tokens)
  return sys.sample_fn(*given, *path, None, sys.pipeline.table if table is None else table)


def test_every_sampler_is_tested_here():
  assert KWARGS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_traced_once_for_many_calls(name):
  """Of other noise, records, parameters and steps: a table is data."""
  traces = []

  def denoise(*args):
    traces.append(1)
    return toy_model.denoise(*args)

  sys = make(named(name), toy_model.make(denoise=denoise), rewards())
  first = sample(sys, 0, NAME, 0, 0)
  seen = len(traces)
  assert 1 <= seen <= 3  # of each step one program, whatever n and the number of steps are
  moved = jax.tree.map(lambda leaf: leaf + 0.5, sys.policy.params)
  other = sys.tokenize([{"prompt": "abc"}] * 3)
  quiet = dataclasses.replace(sys.pipeline.table, noise_scale=np.zeros(3, np.float32))
  for seed, i in ((0, 1), (1, 0), (2, 5)):
    found = sample(sys, seed, NAME, i, 0)
    assert (np.abs(found.samples - first.samples).max(axis=(1, 2, 3)) > 1e-5).all()
  for changed in ({"params": moved}, {"tokens": other}, {"table": quiet}):
    assert np.abs(sample(sys, 0, NAME, 0, 0, **changed).samples - first.samples).max() > 1e-5
  assert len(traces) == seen


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_what_the_contract_says(name):
  sys = make(named(name), total=rewards())
  found, again = (sample(sys, 4, NAME, 1, 2) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, found, again)
  assert (found.rollout is not None) == sys.sampler.keeps_trajectory
  assert found.x_0.shape == (3, 3) and found.x_0.dtype == jnp.float32
  np.testing.assert_array_equal(found.samples, toy_model.decode({}, found.x_0))
  np.testing.assert_allclose(found.cond.cond["text"], [[0.01], [0.02], [0.05]], rtol=1e-6)
  assert all(values.shape == (3,) for values in found.info.values())
  assert sys.sampler.report() == {
    **KWARGS[name], "name": name, "rewards": [f"{__name__}:red"], "kl_bound": sys.sampler.kl_bound
  }  # fmt: skip
  assert sys.sampler.kl_bound is not None


def test_the_chain_is_the_default_and_wants_plain_tokens():
  sys = make(system.CHAIN)
  assert sys.sampler.report() == {"name": "chain", "kl_bound": 0.0}
  np.testing.assert_array_equal(sys.tokenize(RECORDS), sys.model.tokenize(RECORDS))
  assert "rewards" not in sys.frozen and not sample(sys, 0, NAME, 0, 0).info


def test_tokens_without_a_query_are_refused_by_a_sampler_that_wants_one():
  sys = make(named("best_of_n"), total=rewards())
  with pytest.raises(ValueError, match=r"expected what System\.tokenize returns, found no query"):
    sample(sys, 0, NAME, 0, 0, tokens=sys.model.tokenize(RECORDS))


def test_another_sampler_on_the_same_system_and_back():
  sys = make(system.CHAIN)
  steered = sys.with_sampler(named("best_of_n"), rewards())
  assert steered.frozen["base"] is sys.frozen["base"] and steered.kl_fn is sys.kl_fn
  (device,) = [reward.device for reward in steered.rewards.rewards]
  placed = steered.frozen["rewards"][device.name]["shift"]
  assert placed == 0.5 and isinstance(placed, jax.Array)
  back = steered.with_sampler(system.CHAIN)
  assert back.frozen.keys() == sys.frozen.keys()
  one, other = (sample(made, 0, NAME, 0, 0).samples for made in (sys, back))
  np.testing.assert_array_equal(one, other)


def test_parameters_of_rewards_are_arguments_of_the_program():
  """With the shift between black and white, its sign decides nothing; a changed slope does."""
  sys = make(named("best_of_n"), total=rewards())
  before = sample(sys, 0, NAME, 0, 0).info["reward"]
  name = f"{__name__}:red"
  moved = dataclasses.replace(
    sys, frozen={**sys.frozen, "rewards": {name: {"shift": jnp.float32(0.25)}}}
  )
  lengths = np.array([1.0, 2.0, 5.0])
  found = sample(moved, 0, NAME, 0, 0).info["reward"]
  np.testing.assert_allclose(found, before + 0.25 * lengths, rtol=1e-5)


def test_there_is_no_kl_without_trajectories_and_none_is_computed():
  sys = make(named("best_of_n"), total=rewards())
  with pytest.raises(ValueError, match="expected a sampler that keeps trajectories"):
    sys.kl_fn(sys.policy.params, sys.frozen, sample(sys, 0, NAME, 0, 0), sys.pipeline.table)
  samples, nats = sys.sample_all(sys.policy.params, RECORDS, microbatch=2, seed=0, kl=True)
  assert len(samples) == 3 and nats is None
  chain = make(system.CHAIN)
  _, nats = chain.sample_all(chain.policy.params, RECORDS, microbatch=2, seed=0, kl=True)
  assert nats is not None


def test_any_number_of_records_is_sampled_with_their_own_queries():
  sys = make(named("best_of_n"), total=rewards())
  samples, _ = sys.sample_all(sys.policy.params, RECORDS, microbatch=2, seed=0)
  for j, rows in enumerate(([0, 1], [2, 2])):  # the last is padded
    noise = (0, streams.number("evaluation"), 0, j)
    own = sample(sys, *noise, tokens=sys.tokenize([RECORDS[row] for row in rows]))
    np.testing.assert_array_equal(samples[2 * j : 2 * j + 2], own.samples[: 2 - j])


def test_the_floor_of_rounding_is_measured_on_chains():
  exact = toy_model.make(exact=toy_model.denoise)
  floors = [
    precision.measure(made, made.model.tokenize(RECORDS), seed=0)
    for made in (make(system.CHAIN, exact), make(named("best_of_n"), exact, rewards()))
  ]
  assert floors[0] == floors[1]


# A sampler of another package


def make_grey(pipeline, *, level=0.0):
  def sample(key, variables, frozen, inputs, table):
    x_0 = jnp.full(inputs.x_T.shape, level)
    samples = pipeline.decode(frozen, x_0)
    return steering.Sampled(None, inputs.cond, samples, x_0, {"level": x_0[:, 0]})

  return Sampler(sample)


def make_careless(pipeline):
  return make_grey(pipeline)._replace(keeps_trajectory=True)


def make_function(pipeline):
  return make_grey(pipeline).sample


def test_a_sampler_from_outside_the_package():
  sys = make({"name": f"{__name__}:make_grey", "level": 2.0})
  found = sample(sys, 0, NAME, 0, 0)
  np.testing.assert_array_equal(found.x_0, np.full((3, 3), 2.0))
  np.testing.assert_array_equal(found.info["level"], np.full(3, 2.0))
  report = sys.sampler.report()
  assert report == {"level": 2.0, "name": f"{__name__}:make_grey", "kl_bound": None}
  assert steering.in_words(report).endswith("make_grey (level 2.0): KL to the chain not known")


@pytest.mark.parametrize("section, message", [
  ({"name": "best_off_n", "n": 2}, r'unknown sampler "best_off_n"; did you mean "best_of_n"'),
  ({"name": "best_of_n"}, r"missing a required argument: 'n'; valid keys: n"),
  ({"name": "best_of_n", "m": 2}, r'"best_of_n": .*valid keys: n'),
  ({"name": "chain", "n": 2}, r'sampler "chain": .*valid keys: none'),
  ({"n": 2}, r"config.sampler: missing a required argument: 'name'"),
  ({"name": "nowhere:make"}, 'sampler "nowhere:make": could not import module "nowhere"'),
  ({"name": f"{__name__}:make_gray"}, 'has no "make_gray"; did you mean "make_grey"'),
  ({"name": f"{__name__}:make_function"}, r"expected it to return a jaxalign\.steering\.Sampler"),
])  # fmt: skip
def test_a_sampler_that_does_not_fit_is_refused(section, message):
  with pytest.raises(ValueError, match=message):
    make(section, total=rewards())


def test_a_trajectory_is_promised_and_kept_or_neither():
  sys = make({"name": f"{__name__}:make_careless"})
  with pytest.raises(ValueError, match=r"expected Sampled\.rollout exactly where .* it has True"):
    sample(sys, 0, NAME, 0, 0)


# The section of a config


def sections(**changes):
  return {
    "seed": 0,
    "model": {"path": toy_model.PATH},
    "lora": system.NO_LORA,
    "process": PROCESS,
    "guidance": {"scale": 2.0},
    **changes,
  }


def test_a_config_without_a_sampler_has_the_chain_and_no_rewards():
  sys = system.from_config(sections(reward={"names": (f"{__name__}:red",)}))
  assert sys.sampler.name == "chain" and sys.rewards is None


def test_a_config_with_a_sampler_ranks_by_its_reward():
  sys = system.from_config(
    sections(sampler=named("best_of_n"), reward={"names": (f"{__name__}:red",)})
  )
  expected = sample(make(named("best_of_n"), total=rewards()), 0, NAME, 0, 0)
  np.testing.assert_array_equal(sample(sys, 0, NAME, 0, 0).samples, expected.samples)
  on_host = {"names": (f"{toy_model.__name__}:brightness",)}
  with pytest.raises(ValueError, match="expected a reward that runs on the device"):
    system.from_config(sections(sampler=named("best_of_n"), reward=on_host))
