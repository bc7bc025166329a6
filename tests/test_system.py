"""What a system does with noise, records and parameters, on a model of three numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped
import toy_model

from jaxalign import streams, system

pytestmark = pytest.mark.usefixtures("as_shipped")
NUM_STEPS, SCALE, SEED = 3, 4.0, 11
ROLLOUT = streams.number("rollout")
RECORDS = [{"prompt": "x" * length} for length in (1, 2, 5)]


@pytest.fixture(scope="module")
def sys():
  return system.from_model(
    toy_model.make(),
    seed=0,
    lora=system.NO_LORA,
    process={"transition": "ddim", "num_steps": NUM_STEPS, "eta": 1.0},
    guidance={"scale": SCALE},
  )


@pytest.fixture(scope="module")
def tokens(sys):
  return sys.model.tokenize(RECORDS)


def with_bias(value):
  return {"params": {"layer": {"bias": jnp.full(3, value, jnp.float32)}}}


def sample(sys, tokens, *path, params=None, start=None):
  params = sys.policy.params if params is None else params
  return sys.sample_fn(params, sys.frozen, tokens, *path, start, sys.pipeline.table)


def kl(sys, params, sampled):
  return sys.kl_fn(params, sys.frozen, sampled, sys.pipeline.table)


def moments(sys, x_t, s, prediction):
  """Mean and std of step s under a constant prediction."""
  row = sys.pipeline.table[s]
  return sys.process.transition(x_t, jnp.broadcast_to(prediction, x_t.shape), row)


def step_noise(sys, sampled, s, prediction):
  x = sampled.rollout.x
  mean, std = moments(sys, x[s], s, prediction)
  return np.asarray((x[s + 1] - mean) / std)


def guided(tokens):
  """What the base model predicts: a hundredth of the text's length, guided away from none."""
  return SCALE * toy_model.TABLE * tokens


def test_initial_noise_and_step_noise_come_from_different_keys_of_one_stream(sys, tokens):
  """Neither is drawn from a key that has children: the steps have keys below their own."""
  sampled = sample(sys, tokens, SEED, ROLLOUT, 1, 2)
  key_start, key_steps = jax.random.split(streams.stream(SEED, "rollout", 1, 2))
  start = shipped.jit(jax.random.normal, static_argnums=1)(key_start, (3, 3))
  np.testing.assert_array_equal(sampled.rollout.x[0], start)
  for s in sys.process.noisy_steps():
    expected = jax.random.normal(jax.random.fold_in(key_steps, s), (3, 3))
    # What is subtracted is larger than what is left at the last step, where it is nearly 0.
    found = step_noise(sys, sampled, s, guided(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_no_two_microbatches_share_any_noise(sys, tokens):
  names = (ROLLOUT, streams.number("evaluation"))
  paths = list(itertools.product((SEED, 12), names, (0, 1), (0, 1)))
  noise = []
  for path in paths:
    sampled = sample(sys, tokens, *path)
    noise += [sampled.rollout.x[0]]
    noise += [step_noise(sys, sampled, s, guided(tokens)) for s in sys.process.noisy_steps()]
  noise = np.stack(noise).reshape(len(noise), -1)
  assert len(noise) == len(paths) * (1 + NUM_STEPS)
  distance = np.abs(noise[:, None] - noise[None]).max(axis=-1)
  assert (distance[~np.eye(len(noise), dtype=bool)] > 0.1).all()


def test_samples_share_their_start_where_they_are_told_to_and_nothing_else(sys, tokens):
  same = np.repeat(tokens[:1], 3, axis=0)
  plain = sample(sys, same, SEED, ROLLOUT, 0, 0).rollout.x
  shared = sample(sys, same, SEED, ROLLOUT, 0, 0, start=np.array([0, 0, 2])).rollout.x
  np.testing.assert_array_equal(shared[0], plain[0][np.array([0, 0, 2])])
  assert (np.abs(shared[-1, 0] - shared[-1, 1]) > 1e-3).all()  # their steps differ


def test_every_record_is_guided_by_its_own_condition(sys, tokens):
  sampled = sample(sys, tokens, SEED, ROLLOUT, 0, 0)
  np.testing.assert_allclose(sampled.cond.cond["text"], [[0.01], [0.02], [0.05]], rtol=1e-6)
  np.testing.assert_array_equal(sampled.cond.uncond["text"], [[0.0]])
  np.testing.assert_array_equal(sys.condition_fn(sys.frozen, tokens).cond["text"],
                                sampled.cond.cond["text"])  # fmt: skip
  np.testing.assert_array_equal(sampled.samples[:, 0, 0],
                                sys.model.decode({}, sampled.rollout.x_0)[:, 0, 0])  # fmt: skip


def test_samples_are_made_with_the_parameters_that_are_given(sys, tokens):
  base, other = (
    sample(sys, tokens, SEED, ROLLOUT, 0, 0, params=with_bias(value)).rollout.x for value in (0, 1)
  )
  np.testing.assert_array_equal(base[0], other[0])
  shift = moments(sys, base[0], 0, 1.0)[0] - moments(sys, base[0], 0, 0.0)[0]
  np.testing.assert_allclose(other[1] - base[1], shift, rtol=1e-4)


def test_the_kl_is_that_of_all_steps_against_the_base_model(sys, tokens):
  """Two Gaussians of one std: the squared distance of their means over twice the variance."""
  sampled = sample(sys, tokens, SEED, ROLLOUT, 0, 0)
  np.testing.assert_array_equal(kl(sys, sys.policy.params, sampled), np.zeros(3))
  expected = 0.0
  for s in range(NUM_STEPS):
    x = sampled.rollout.x[s]
    mean, std = moments(sys, x, s, 0.0)
    moved, _ = moments(sys, x, s, 0.5)
    expected += (jnp.square((moved - mean) / std) / 2).sum(axis=1)
  np.testing.assert_allclose(kl(sys, with_bias(0.5), sampled), expected, rtol=1e-4)


def test_encoding_has_noise_of_its_own_for_every_microbatch_and_iteration(sys):
  samples = np.full((2, 2, toy_model.SIZE, toy_model.SIZE, 3), 0.25, np.float32)
  samples[1] = 0.75
  seen = {}
  for seed, i, j in itertools.product((SEED, 12), (0, 1), (0, 1)):
    x_0 = np.asarray(sys.encode_fn(sys.frozen, samples, seed, i, j))
    assert x_0.shape == (2, 2, 3)
    noise = jax.random.normal(streams.stream(seed, "encoding", i, j), (4, 3)).reshape(2, 2, 3)
    np.testing.assert_allclose(x_0 - noise, samples[:, :, 0, 0], atol=1e-5)
    seen[seed, i, j] = x_0
  for one, other in itertools.combinations(seen.values(), 2):
    assert np.abs(one - other).max() > 0.1


def test_any_number_of_records_is_sampled_in_microbatches(sys):
  """Seven in microbatches of three: the last is padded, and every sample is of its record."""
  records = [{"prompt": "x" * length} for length in range(1, 8)]
  samples, nats = sys.sample_all(
    with_bias(0.5), records, microbatch=3, seed=SEED, part=2, kl=True
  )
  assert samples.shape == (7, toy_model.SIZE, toy_model.SIZE, 3) and nats.shape == (7,)
  for j, start in enumerate((0, 3, 6)):
    own = sys.model.tokenize([*records[start : start + 3], *[records[-1]] * 2][:3])
    noise = (SEED, streams.number("evaluation"), 2, j)
    one = sample(sys, own, *noise, params=with_bias(0.5))
    np.testing.assert_array_equal(samples[start : start + 3], one.samples[: 7 - start])
    expected = kl(sys, with_bias(0.5), one)
    np.testing.assert_allclose(nats[start : start + 3], expected[: 7 - start], rtol=1e-6)
