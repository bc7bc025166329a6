"""Best of n: the order statistics that it must have, the draws it is made of, what it refuses.

On the gaussian world a linear reward of the chain's samples is exactly normal, so that the mean of
the best of n and its KL to the chain are known.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped
from scipy import stats

from jaxalign import steering, streams, system
from jaxalign.rewards import combine
from jaxalign.steering import best_of_n
from jaxalign.worlds import planner

NAME = streams.number("evaluation")
LINEAR = {"curvature": ((0.0, 0.0), (0.0, 0.0)), "slope": (0.8, -0.5)}
MANY = 20_000
EXPECTED_MAX = {2: 0.5642, 4: 1.0294}  # of n independent N(0, 1)
RECORDS = planner.records("test")[:6]


def make(world, rewards=(), kwargs=None, **sampler):
  process = {
    "gaussian": {"transition": "ddim", "num_steps": 8, "eta": 1.0},
    "planner": {"transition": "flow_sde", "num_steps": 4, "noise_level": 0.3},
  }[world]
  return system.make_system(
    seed=0,
    model={"path": world},
    lora=system.NO_LORA,
    process=process,
    guidance={"scale": 1.0},
    sampler={"name": "best_of_n", **sampler} if sampler else system.CHAIN,
    rewards=combine.make_total(rewards, kwargs=kwargs) if rewards else None,
  )


def sample(sys, records, seed=0, i=0):
  noise = (seed, NAME, i, 0, None, sys.pipeline.table)
  return sys.sample_fn(sys.policy.params, sys.frozen, sys.tokenize(records), *noise)


def rewards_on_gaussian(kwargs, n=None):
  sys = make("gaussian", ("gaussian_quadratic",), (kwargs,), **({"n": n} if n else {"n": 1}))
  # The chain's own are those of other microbatches, so that nothing is compared with itself.
  sampled = sample(sys, [{"number": k} for k in range(MANY)], i=1 if n else 0)
  return np.asarray(sampled.info["reward"], np.float64)


@pytest.fixture(scope="module")
def of_chain():
  return rewards_on_gaussian(LINEAR)


@pytest.mark.parametrize("n", EXPECTED_MAX)
def test_the_best_of_n_normal_rewards_is_their_order_statistic(n, of_chain):
  best = rewards_on_gaussian(LINEAR, n)
  z = (best - of_chain.mean()) / of_chain.std()
  # Of two means and a deviation, each of MANY.
  error = np.sqrt((z.var() + 1.0 + EXPECTED_MAX[n] ** 2 / 2) / MANY)
  assert abs(z.mean() - EXPECTED_MAX[n]) < 4 * error < 0.06


@pytest.mark.parametrize("n", EXPECTED_MAX)
def test_its_kl_to_the_chain_reaches_the_bound_where_rewards_differ(n, of_chain):
  """The density ratio is n F(reward)^(n - 1), with F the chain's distribution of rewards."""
  z = (rewards_on_gaussian(LINEAR, n) - of_chain.mean()) / of_chain.std()
  log_ratio = math.log(n) + (n - 1) * stats.norm.logcdf(z)
  assert log_ratio.mean() == pytest.approx(best_of_n.kl_bound(n), abs=0.03)


def test_ranks_are_those_of_the_best_of_four_whatever_the_reward():
  """The best of n is at n / (n + 1) of the chain's rewards, on average."""
  found = np.searchsorted(np.sort(rewards_on_gaussian({})), rewards_on_gaussian({}, 4)) / MANY
  assert found.mean() == pytest.approx(4 / 5, abs=0.01)


@pytest.mark.parametrize("n, nats", [(1, 0.0), (2, 0.1931), (4, 0.6363), (16, 1.8351)])
def test_the_bound_on_the_kl(n, nats):
  assert best_of_n.kl_bound(n) == pytest.approx(nats, abs=5e-5)
  assert make("gaussian", ("gaussian_quadratic",), n=n).sampler.kl_bound == best_of_n.kl_bound(n)


@pytest.mark.parametrize("world, reward", [
  ("gaussian", "gaussian_quadratic"), ("planner", "planner")
])
def test_one_draw_is_the_chain_to_the_bit(world, reward):
  chain, one = sample(make(world), RECORDS), sample(make(world, (reward,), n=1), RECORDS)
  assert one.info["reward"].shape == (len(RECORDS),)
  same = dataclasses.replace(one, info={})
  jax.tree.map(np.testing.assert_array_equal, same, chain)  # trajectories and all
  np.testing.assert_array_equal(chain.x_0, chain.rollout.x_0)


def draws_of(sys, records, n):
  """The n chains of each record, `[n, m, ...]`, from the noise that `best_of_n` says it takes."""
  tokens, table = sys.model.tokenize(records), sys.pipeline.table
  key_start, key = jax.random.split(streams.stream(0, "evaluation", 0, 0))
  shape = (len(records), *sys.model.latent_shape)
  noise = [(key, jax.random.normal(key_start, shape))]
  for k in range(1, n):
    start, steps = jax.random.split(jax.random.fold_in(key, table.num_steps + k))
    noise.append((steps, jax.random.normal(start, shape)))
  draw = jax.jit(make("planner").sample)
  args = (sys.policy.params, sys.frozen, tokens)
  return np.stack([draw(*args, x_T, key, table).samples for key, x_T in noise])


def test_each_record_gets_the_best_of_its_own_draws():
  """Records are far apart, so that the query of another record would choose other plans."""
  sys = make("planner", ("planner",), n=5)
  (reward,) = sys.rewards.rewards
  draws = draws_of(sys, RECORDS, 5)
  values = np.stack([reward.fn(plans, RECORDS) for plans in draws])  # [n, m]
  sampled = sample(sys, RECORDS)
  chosen = values.argmax(axis=0)
  assert len(set(chosen)) > 1
  expected = draws[chosen, np.arange(len(RECORDS))]
  np.testing.assert_allclose(sampled.samples, expected, atol=1e-5)
  np.testing.assert_allclose(sampled.info["reward"], values.max(axis=0), atol=1e-4)
  other = np.stack([reward.fn(plans, RECORDS[::-1]) for plans in draws]).argmax(axis=0)
  assert (other != chosen).any()


def test_no_two_draws_and_no_two_microbatches_share_noise():
  draws = draws_of(make("planner", ("planner",), n=1), RECORDS, 5).reshape(5 * len(RECORDS), -1)
  distance = np.abs(draws[:, None] - draws[None]).max(axis=-1)
  assert (distance[~np.eye(len(draws), dtype=bool)] > 1e-3).all()
  sys = make("planner", ("planner",), n=4)
  first, second = (np.asarray(sample(sys, RECORDS, i=i).samples) for i in (0, 1))
  assert (np.abs(first - second).max(axis=(1, 2)) > 1e-3).all()


def choose(reward, n=4):
  """What `best_of_n` keeps of chains whose end is the noise they start from, two records."""
  steps = make("gaussian").pipeline
  pipeline = steps._replace(
    kernel=steps.kernel._replace(denoise_fn=lambda variables, x, t, cond: x),
    reward=lambda frozen, samples, query: reward(samples, query),
  )
  made = best_of_n.make(pipeline, n=n)
  inputs = steering.Inputs(None, jnp.ones((2, 2)), jnp.arange(2.0))
  return shipped.jit(made.sample)(jax.random.key(3), {}, {}, inputs, pipeline.table)


def test_of_equals_the_first_is_kept():
  first, best = choose(lambda x, query: x[:, 0], n=1), choose(lambda x, query: 0.0 * x[:, 0])
  np.testing.assert_array_equal(best.samples, first.samples)


@pytest.mark.parametrize("worst", [jnp.nan, -jnp.inf])
def test_a_reward_that_is_no_number_ranks_last_and_is_not_hidden(worst):
  def failing(x, query):  # of the first record every draw below its median, of the second all
    return jnp.where((query == 0) & (x[:, 0] > 0), x[:, 0], worst)

  best = choose(failing, n=16)
  assert best.info["reward"][0] > 0 and best.samples[0, 0] == best.info["reward"][0]
  assert best.info["reward"][1] == -jnp.inf  # and no zeros, with which the search begins
  np.testing.assert_array_equal(best.samples[1], choose(failing, n=1).samples[1])


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "4"])
def test_n_is_a_whole_number_of_at_least_one(n):
  with pytest.raises(ValueError, match=r"n.* a whole number"):
    make("gaussian", ("gaussian_quadratic",), n=n)


def test_a_reward_on_the_device_is_asked_for():
  with pytest.raises(ValueError, match=r"runs on the device, .* found none\nname one: --sampler"):
    make("planner", n=2)
  with pytest.raises(ValueError, match=r"found planner_success on the host only\nname others: "):
    make("planner", ("planner", "planner_success"), n=2)
  normalized = combine.make_total(("planner",), normalize="batch")
  with pytest.raises(ValueError, match="found a normalisation over a batch"):
    make("planner").with_sampler({"name": "best_of_n", "n": 2}, normalized)


def test_records_that_the_reward_cannot_read_are_named():
  sys = make("gaussian", ("planner",), n=2)
  message = r'what the sampler goes by: reward "planner": record 0: .*start'
  with pytest.raises(ValueError, match=message):
    sys.tokenize([{"number": 1}])
