"""Fits the embedded `planner`: a flow model that imitates demonstrations of mixed quality.

  python -m jaxalign.recipes.planner_model --output=runs/planner

Run on one CPU core that was shared with other work: 4500 updates in 5 minutes, 3.5 minutes of CPU
time with drawing and compiling. The model has 113,042 parameters. With 10 Euler steps and without
guidance 49.8 % of its plans for test records succeed (96 records, 16 plans of each), and 47.4 % for
validation records; of the demonstrations it imitates 90 % do.
"""

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxalign import streams
from jaxalign.cli import command, paths
from jaxalign.diffusion import predictions, rollout, schedules
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.models.families import initialization
from jaxalign.models.families import planner as family
from jaxalign.models.model import Model
from jaxalign.models.networks import temporal
from jaxalign.training import fit as fit_lib
from jaxalign.types import Array, Params, Record
from jaxalign.worlds import planner

CONFIG = temporal.TemporalConfig()
CONDITION_DROPOUT = 0.1
OPTIMIZER = {
  "learning_rate": 3e-3,
  "max_grad_norm": 1.0,
  "weight_decay": 0.0,
  "b1": 0.9,
  "b2": 0.99,
  "epsilon": 1e-8,
  "warmup_steps": 100,
}


def fit(
  output: str | os.PathLike,
  *,
  seed: int = 0,
  num_plans: int = 32_768,
  batch_size: int = 128,
  num_steps: int = 4500,
) -> pathlib.Path:
  """Fits the model from nothing, or on from where it was stopped; returns its folder.

  Args:
    output: holds the fit in "denoiser" and the finished model in "model".
    seed: decides everything.
    num_plans: demonstrations, each of ends of its own. Those of the sets of records are on a grid
      of hundredths, which these are not.
    batch_size: plans of an update.
    num_steps: updates.
  """
  output = pathlib.Path(output)
  params = initialization.random_params(streams.stream(seed, "model"), family.param_shapes(CONFIG))
  model = family.build(CONFIG, params)
  params = fit_lib.fit(
    "denoiser",
    output,
    params,
    make_loss(model),
    plan_batches(*draw_plans(num_plans, seed=seed), seed=seed, batch_size=batch_size),
    key=streams.stream(seed, "denoiser"),
    num_steps=num_steps,
    log_every=100,
    checkpoint_every=1000,
    **OPTIMIZER,
  )
  model.files.save({"denoiser": params}, output / "model")
  return output / "model"


def draw_plans(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Starts and goals `[count, 2]` and a demonstration of each, `[count, H, 2]`; float32."""
  rng = streams.generator(seed, "demonstrations")
  start, goal = planner.draw_ends(rng, count)
  plans = planner.demonstrate(rng, start, goal)
  return start.astype(np.float32), goal.astype(np.float32), plans


def plan_batches(
  start: np.ndarray, goal: np.ndarray, plans: np.ndarray, *, seed: int, batch_size: int
) -> Callable[[int], tuple[np.ndarray, dict[str, np.ndarray]]]:
  """`batches(step)` of plans and tokens; a dropped condition trains the unconditional branch.

  Ho & Salimans 2022 (arXiv:2207.12598) algorithm 1.
  """

  def batches(step):
    rng = streams.generator(seed, "denoiser batches", step)
    rows = rng.integers(len(plans), size=batch_size)
    given = (rng.random((batch_size, 1)) >= CONDITION_DROPOUT).astype(np.float32)
    tokens = {"start": given * start[rows], "goal": given * goal[rows], "given": given}
    return plans[rows], tokens

  return batches


def make_loss(model: Model) -> fit_lib.LossFn:
  """Flow matching at a uniformly drawn noise level (Lipman et al. 2022, arXiv:2210.02747, eq. 9).

  Mean over the batch and all numbers of the squared error of the velocity.
  """

  def loss_fn(params, batch, key):
    x_0, tokens = batch
    key_level, key_noise = jax.random.split(key)
    level = jax.random.randint(key_level, x_0.shape[:1], 0, model.levels.num_steps)
    step = model.levels[level]
    eps = jax.random.normal(key_noise, x_0.shape)
    x_t = schedules.add_noise(x_0, eps, step.alpha_t, step.sigma_t)
    cond = model.condition({}, tokens)
    prediction = model.denoise({"params": params}, x_t, step.t, cond)
    target = predictions.target(x_0, eps, step.alpha_t, step.sigma_t, model.prediction_type)
    loss = jnp.mean(jnp.square(prediction - target))
    return loss, {"loss/denoising": loss}

  return loss_fn


def sample(
  model: Model, params: Params, records: Sequence[Record], *, seed: int, num_steps: int
) -> Array:
  """One plan of each record with Euler's method and no guidance, `[B, H, 2]`."""
  process = model.make_process(num_steps=num_steps, transition="euler")
  cond = model.condition({}, model.tokenize(records))
  key_start, key_steps = jax.random.split(streams.stream(seed, "evaluation", 0, 0))
  x_T = jax.random.normal(key_start, (len(records), *model.latent_shape))
  kernel = Kernel(model.denoise, process.transition)
  args = (kernel, {"params": params}, process.table, x_T, cond, mean_over_latents)
  return rollout.rollout(key_steps, *args).x_0


def success_rate(folder: str | os.PathLike, split: str, *, num_plans: int = 16) -> float:
  """The share of plans that succeed, over the records of a set, `num_plans` for each; 10 steps."""
  folder = pathlib.Path(folder)
  model = family.open_model(folder)
  params = jax.tree.map(np.asarray, model.params["denoiser"])
  records = planner.records(split) * num_plans
  plans = sample(model, params, records, seed=0, num_steps=10)
  return float(jnp.mean(planner.success(plans, *planner.read_records(records))))


def define_flags(values: flags.FlagValues) -> None:
  paths.define("output", None, "Folder to write to.", required=True, flag_values=values)
  help = "Of weights, demonstrations and noise."
  flags.DEFINE_integer("seed", 0, help, flag_values=values)
  flags.DEFINE_integer("num_steps", 4500, "Updates.", flag_values=values)


def main(values: flags.FlagValues) -> None:
  folder = fit(values.output, seed=values.seed, num_steps=values.num_steps)
  for split in ("validation", "test"):
    print(f"success on {split:12}{success_rate(folder, split):.3f}")


if __name__ == "__main__":
  command.run(main, define_flags)
