import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.modalities.image import IMAGES
from jaxalign.rewards import combine, contract, pool

MICROBATCH = 2


def total_of(fn):
  return combine.WeightedRewards((contract.Reward("mine", fn),), (2.0,), "none")


def microbatch(i):
  """Two images whose first pixel says which they are, and their prompts."""
  first = MICROBATCH * i
  images = np.broadcast_to(np.float32([first, first + 1])[:, None, None, None], (2, 4, 4, 3)) / 100
  return images, [{"prompt": "x", "id": first + j} for j in range(MICROBATCH)]


def read_index(images, prompts):
  np.testing.assert_allclose(images[:, 0, 0, 0] * 100, [p["id"] for p in prompts], atol=1e-4)
  return np.round(images[:, 0, 0, 0] * 100)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_order_is_kept_under_random_delays(num_threads):
  rng = np.random.default_rng(0)
  delays = {2 * i: d for i, d in enumerate(rng.uniform(0, 0.02, 12))}
  finished = []

  def slow(images, prompts):
    time.sleep(delays[prompts[0]["id"]])
    finished.append(prompts[0]["id"])
    return read_index(images, prompts)

  with pool.RewardPool(total_of(slow), IMAGES.check, num_threads) as workers:
    pending = [workers.submit(*microbatch(i)) for i in range(12)]
    named = workers.gather(pending)
  if num_threads > 1:
    assert finished != sorted(finished)  # they really did overtake one another
  np.testing.assert_array_equal(named["mine"], np.arange(24))


def test_submit_returns_while_the_reward_is_running():
  release = threading.Event()

  def waits(images, prompts):
    assert release.wait(10)
    return read_index(images, prompts)

  with pool.RewardPool(total_of(waits), IMAGES.check, num_threads=1) as workers:
    pending = [workers.submit(*microbatch(i)) for i in range(3)]
    assert not any(future.done() for future in pending)
    release.set()
    named = workers.gather(pending)
  np.testing.assert_array_equal(named["mine"], np.arange(6))


def test_the_copy_to_the_host_is_made_in_the_worker():
  class Images:
    def __array__(self, dtype=None, copy=None):
      copied_in.append(threading.current_thread())
      return microbatch(0)[0].astype(dtype)

  copied_in = []
  with pool.RewardPool(total_of(read_index), IMAGES.check, num_threads=1) as workers:
    workers.gather([workers.submit(Images(), microbatch(0)[1])])
  assert copied_in and threading.main_thread() not in copied_in


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_device_arrays_arrive_as_float32_numpy(dtype):
  def checks(images, prompts):
    assert type(images) is np.ndarray and images.dtype == np.float32
    return images.mean(axis=(1, 2, 3))

  images = jnp.full((2, 4, 4, 3), 0.25, dtype)
  with pool.RewardPool(total_of(checks), IMAGES.check, num_threads=2) as workers:
    named = workers.gather([workers.submit(images, [{"prompt": "x"}] * 2)])
  np.testing.assert_array_equal(named["mine"], [0.25, 0.25])


def test_an_exception_comes_out_of_result_and_of_gather():
  def fails(images, prompts):
    if prompts[0]["id"] == 2:
      raise RuntimeError("server is gone")
    return read_index(images, prompts)

  with pool.RewardPool(total_of(fails), IMAGES.check, num_threads=2) as workers:
    pending = [workers.submit(*microbatch(i)) for i in range(3)]
    with pytest.raises(contract.RewardError, match="RuntimeError: server is gone"):
      workers.gather(pending)
    assert pending[0].result()["mine"].tolist() == [0.0, 1.0]
    with pytest.raises(contract.RewardError, match="RuntimeError: server is gone"):
      pending[1].result()


def test_a_non_finite_reward_brings_its_image_across_the_thread():
  images, prompts = microbatch(3)
  bad = total_of(lambda i, p: np.array([0.0, np.inf]))
  with pool.RewardPool(bad, IMAGES.check, num_threads=1) as workers:
    future = workers.submit(images, prompts)
    with pytest.raises(contract.RewardError, match='"mine": 1 of 2') as caught:
      future.result()
  assert caught.value.index == 1
  np.testing.assert_array_equal(caught.value.sample, images[1])


def test_leaving_the_block_drops_what_waits_and_ends_the_threads():
  started, release = threading.Event(), threading.Event()

  def waits(images, prompts):
    started.set()
    assert release.wait(10)
    return read_index(images, prompts)

  threads_before = threading.active_count()
  workers = pool.RewardPool(total_of(waits), IMAGES.check, num_threads=1)
  with pytest.raises(KeyError), workers:
    pending = [workers.submit(*microbatch(i)) for i in range(3)]
    assert started.wait(10)
    threading.Timer(0.05, release.set).start()
    raise KeyError("the training loop failed")
  assert pending[0].done() and not pending[0].cancelled()
  assert pending[1].cancelled() and pending[2].cancelled()
  assert threading.active_count() <= threads_before + 1  # the timer may still be on its way out
  with pytest.raises(RuntimeError):
    workers.submit(*microbatch(0))


def test_a_nan_image_is_refused_rather_than_scored_as_black():
  images, records = microbatch(3)
  images = images.copy()
  images[1, 3, 2, 0] = np.nan
  with pool.RewardPool(total_of(read_index), IMAGES.check, num_threads=1) as workers:
    future = workers.submit(images, records)
    with pytest.raises(contract.RewardError, match=r"1 of 2 with NaN or inf.*index 1") as caught:
      future.result()
  np.testing.assert_array_equal(caught.value.sample, images[1])


class Flaky:
  """A reward that fails the first times that it is called."""

  def __init__(self, failures, error=None):
    self.failures, self.error, self.calls = failures, error, 0

  def __call__(self, images, prompts):
    self.calls += 1
    if self.calls <= self.failures:
      raise self.error or ConnectionError("server is gone")
    return read_index(images, prompts)


def gathered(reward, **retries):
  with pool.RewardPool(total_of(reward), IMAGES.check, num_threads=1, **retries) as workers:
    return workers.gather([workers.submit(*microbatch(1))])["mine"]


def test_a_reward_that_raises_is_asked_again(capsys):
  reward = Flaky(2)
  np.testing.assert_array_equal(gathered(reward, num_retries=2, retry_seconds=0.001), [2, 3])
  assert reward.calls == 3
  said = capsys.readouterr().err
  assert '"mine": attempt 1 of 3 failed: ConnectionError: server is gone; again in 0.001 s' in said
  assert "attempt 2 of 3" in said and "again in 0.002 s" in said


def test_after_the_last_attempt_the_error_says_how_many_there_were():
  reward = Flaky(9)
  with pytest.raises(contract.RewardError, match="failed 3 times, at last by: ConnectionError"):
    gathered(reward, num_retries=2, retry_seconds=0.0)
  assert reward.calls == 3
  with pytest.raises(contract.RewardError, match='"mine" failed: ConnectionError'):
    gathered(Flaky(1))


def test_what_a_reward_returns_is_final():
  calls = []

  def not_finite(images, prompts):
    calls.append(1)
    return np.array([0.0, np.nan])

  with pytest.raises(contract.RewardError, match="1 of 2 values are not finite"):
    gathered(not_finite, num_retries=5, retry_seconds=0.0)
  own = Flaky(9, contract.RewardError("no such prompt"))
  with pytest.raises(contract.RewardError, match="no such prompt"):
    gathered(own, num_retries=5, retry_seconds=0.0)
  assert len(calls) == own.calls == 1


def test_a_pool_that_closes_waits_for_no_other_attempt():
  reward = Flaky(9)
  workers = pool.RewardPool(
    total_of(reward), IMAGES.check, num_threads=1, num_retries=9, retry_seconds=1000.0
  )
  pending = workers.submit(*microbatch(0))
  while not reward.calls:
    time.sleep(0.001)
  began = time.monotonic()
  workers.close()
  assert time.monotonic() - began < 10
  with pytest.raises(contract.RewardError, match='"mine" failed: ConnectionError'):
    pending.result()


@pytest.mark.parametrize("field, value", [
  ("num_retries", -1), ("num_retries", 1.5), ("num_retries", True),
  ("retry_seconds", -0.5), ("retry_seconds", float("nan")),
])  # fmt: skip
def test_retries_that_make_no_sense_are_refused(field, value):
  with pytest.raises(ValueError, match=rf"config\.reward_pool\.{field}: expected"):
    gathered(read_index, **{field: value})
