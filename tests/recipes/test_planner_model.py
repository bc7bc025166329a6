"""The recipe of the embedded planner, a few steps of it, and what it shipped."""

import jax
import numpy as np

from jaxalign.models.families import planner as family
from jaxalign.models.weights import hub
from jaxalign.recipes import planner_model
from jaxalign.worlds import planner


def test_a_few_steps_write_a_model_that_opens(tmp_path):
  folder = planner_model.fit(tmp_path, num_plans=64, batch_size=8, num_steps=102)
  assert family.open_model(folder).latent_shape == (planner.HORIZON, 2)
  # It continues where it was stopped: the same weights, and no step more.
  first = (folder / "denoiser" / "diffusion_pytorch_model.safetensors").read_bytes()
  planner_model.fit(tmp_path, num_plans=64, batch_size=8, num_steps=102)
  assert (folder / "denoiser" / "diffusion_pytorch_model.safetensors").read_bytes() == first


def test_batches_drop_a_tenth_of_the_conditions_whole():
  start, goal, plans = planner_model.draw_plans(50, seed=0)
  batches = planner_model.plan_batches(start, goal, plans, seed=0, batch_size=4000)
  drawn, tokens = batches(3)
  given = tokens["given"][:, 0] == 1
  assert abs(given.mean() - 0.9) < 5 * 0.3 / 4000**0.5
  np.testing.assert_allclose(drawn[given][:, 0], tokens["start"][given], atol=1e-6)
  np.testing.assert_allclose(drawn[given][:, -1], tokens["goal"][given], atol=1e-6)
  assert not tokens["start"][~given].any() and not tokens["goal"][~given].any()
  np.testing.assert_array_equal(batches(3)[0], drawn)


def test_no_demonstration_has_the_ends_of_a_record():
  start, goal, _ = planner_model.draw_plans(2000, seed=0)
  of_records = [
    (*record["start"], *record["goal"])
    for split in planner.SIZES
    for record in planner.records(split)
  ]
  ends = np.concatenate([start, goal], axis=1)
  nearest = np.abs(ends[:, None] - np.array(of_records, np.float32)).max(axis=-1).min()
  assert nearest > 1e-5


def test_the_embedded_model_has_room_to_be_aligned():
  folder = hub.find_model("planner")
  model = family.open_model("planner")
  assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.params)) == 113_042
  assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**20
  assert 0.4 < planner_model.success_rate(folder, "validation", num_plans=4) < 0.6
