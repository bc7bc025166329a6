"""What the main loop hands from part to part, on a model of three numbers.

The method logs what its loss was given, so that a run's metrics say which key, which parameters and
which statistics it had.
"""

import jax
import numpy as np
import pytest
import toy_model

from jaxalign import streams, train
from jaxalign.training import checkpoint, metrics

SEED, NUM_ITERATIONS, UPDATES, SLICES, MICROBATCH = 6, 3, 2, 4, 4
RATE = 0.25


@pytest.fixture(scope="module")
def workdir(load_config, tmp_path_factory):
  config = load_config("ddpo", "quicktest")
  config.seed, config.num_iterations = SEED, NUM_ITERATIONS
  config.model.path, config.lora.targets = toy_model.PATH, ""
  config.method = {"name": "toy_model:make_noting"}
  config.process.num_steps = SLICES
  # Eight samples: two updates of a microbatch, of which every step is a slice.
  config.batch.update({"num_records": 4, "group_size": 2, "microbatch": MICROBATCH})
  config.batch.update({"updates_per_epoch": UPDATES, "timestep_range": (0.0, 1.0)})
  statistics = {"buffer_size": 8, "min_count": 1, "epsilon": 1.0, "limit": 5.0}
  config.advantage = {"name": "per_prompt", **statistics}
  config.reward.names = config.evaluation.rewards = ("toy_model:brightness",)
  # Steps that are known: of a constant gradient Adam takes one of the rate, whatever its size.
  config.optim.update({"learning_rate": RATE, "b1": 0.0, "max_grad_norm": 100.0})
  config.evaluation.num_samples = 4
  workdir = tmp_path_factory.mktemp("run")
  train.train(config, workdir)
  return workdir


@pytest.fixture(scope="module")
def logged(workdir):
  found = metrics.read(workdir)
  assert [record["step"] for record in found] == list(range(NUM_ITERATIONS))
  return found


def test_every_slice_update_and_iteration_has_a_key_of_its_own(logged):
  for i, record in enumerate(logged):
    keys = [
      streams.stream(SEED, "loss", i, j, k) for j in range(UPDATES) for k in range(SLICES)
    ]
    noise = np.mean([jax.random.uniform(key, (MICROBATCH,)) for key in keys])
    assert record["noted/noise"] == pytest.approx(noise, abs=1e-6)


def test_only_the_first_update_of_an_iteration_is_fresh(logged):
  assert [record["noted/fresh"] for record in logged] == [1 / UPDATES] * NUM_ITERATIONS


def test_every_update_begins_with_the_parameters_that_the_one_before_has_left(logged, workdir):
  taken = 0
  for record in logged:
    before = [-RATE * (taken + j) for j in range(UPDATES)]
    assert record["noted/bias"] == pytest.approx(np.mean(before), abs=1e-4)
    taken += UPDATES
  step, state = checkpoint.read_latest(workdir)
  assert step == int(state["step"]) == NUM_ITERATIONS
  bias = state["params"]["params"]["layer"]["bias"]
  np.testing.assert_allclose(bias, np.full(3, -RATE * taken), atol=1e-4)


def test_the_statistics_of_all_iterations_are_in_the_state(workdir):
  _, state = checkpoint.read_latest(workdir)
  assert state["memory"]["count"].sum() == NUM_ITERATIONS * 8
