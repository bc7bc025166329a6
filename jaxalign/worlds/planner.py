"""A planning world: way points in the plane around fixed circular obstacles, with known truth.

A plan is `[H, 2]` way points of a point mass, H = 16, within [-1, 1]^2. A record asks for one plan:
`{"start": (x, y), "goal": (x, y)}`, from the left side of the field to the right. What a plan is
worth is known in closed form, by attributes that are pure functions of plans `[B, H, 2]` and of
start and goal `[B, 2]`; lengths are in units of the field, whose side is 2.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, streams
from jaxalign.types import Array, Record

HORIZON = 16  # way points of a plan
TOLERANCE = 0.1  # how far the ends of a plan that succeeds may be from start and goal
SOFTNESS = 0.05  # of `clearance`: the distance over which its penalty falls to a third
# Circles (x, y, radius). Most straight lines across enter one, and there is always a way around.
OBSTACLES = ((0.0, 0.0, 0.28), (-0.4, 0.5, 0.17), (0.4, -0.5, 0.17))
SIZES = {"test": 96, "validation": 48, "train": 400}  # records of each set
_SIDE, _HEIGHT = (0.75, 0.95), 0.8  # |x| and the largest |y| of starts and goals
_FIRST_SEED = 0  # the sets of records are the same in every run


# Records


def draw_ends(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Starts on the left and goals on the right, float64 `[count, 2]` each, uniform on two strips."""
  x = rng.uniform(*_SIDE, size=(2, count))
  y = rng.uniform(-_HEIGHT, _HEIGHT, size=(2, count))
  return np.stack([-x[0], y[0]], axis=1), np.stack([x[1], y[1]], axis=1)


def records(split: str) -> tuple[Record, ...]:
  """The records of "train", "validation" or "test", on a grid of hundredths.

  They are one list without repetitions, cut in three, so that no record is in two sets.
  """
  checks.check_choice("planner records", split, SIZES)
  names = list(SIZES)
  first = sum(SIZES[name] for name in names[: names.index(split)])
  return tuple(dict(record) for record in _all_records()[first : first + SIZES[split]])


@functools.cache
def _all_records() -> list[Record]:
  total = sum(SIZES.values())
  drawn = draw_ends(streams.generator(_FIRST_SEED, "planner records"), 2 * total)
  rows = np.concatenate(drawn, axis=1).round(2).tolist()
  unique = list(dict.fromkeys(map(tuple, rows)))[:total]
  return [{"start": row[:2], "goal": row[2:]} for row in unique]


def read_records(rows: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
  """Start and goal of each record, float32 `[B, 2]`.

  Raises ValueError, naming the record and the field, unless both are two numbers in [-1, 1].
  """
  ends = [[_read_point(i, row, name) for i, row in enumerate(rows)] for name in ("start", "goal")]
  start, goal = (np.array(points, np.float32).reshape(-1, 2) for points in ends)
  return start, goal


def _read_point(index: int, record: Record, name: str) -> np.ndarray:
  expected = f'record {index}: expected a "{name}" of two numbers'
  if name not in record:
    raise ValueError(f"{expected}, found none")
  try:
    point = np.asarray(record[name], np.float64)
  except (TypeError, ValueError):
    point = np.full(0, np.nan)
  if point.shape != (2,):
    raise ValueError(f"{expected}, found {record[name]!r}")
  if not (np.abs(point) <= 1.0).all():  # also without NaN
    raise ValueError(f"{expected} in [-1, 1], found {record[name]!r}")
  return point


# Attributes


def rim_distances(plans: Array) -> jax.Array:  # [B, H, 2] -> [B, H - 1, K]
  """From each segment of a plan to the rim of each obstacle; negative where it enters one."""
  circles = jnp.asarray(OBSTACLES, jnp.float32)
  first, along = plans[:, :-1, None], (plans[:, 1:] - plans[:, :-1])[:, :, None]
  to_center = circles[:, :2] - first
  # A segment without length is its first point.
  squared_length = jnp.maximum(jnp.sum(jnp.square(along), axis=-1), 1e-12)
  share = jnp.clip(jnp.sum(to_center * along, axis=-1) / squared_length, 0.0, 1.0)
  return _norm(to_center - share[..., None] * along) - circles[:, 2]


def clearance(plans: Array, start: Array, goal: Array) -> jax.Array:  # [B]
  """How well a plan keeps out of obstacles, at most 0; higher is better.

  -(1 / (H - 1)) sum over segments and obstacles of softplus(-d / SOFTNESS), d the distance from
  the rim: log 2 for a segment that touches it, the depth in units of SOFTNESS far inside.
  """
  del start, goal
  return -jnp.mean(jnp.sum(jax.nn.softplus(-rim_distances(plans) / SOFTNESS), axis=-1), axis=-1)


def length(plans: Array, start: Array, goal: Array) -> jax.Array:  # [B]
  """The length of the way, at least 0."""
  del start, goal
  return jnp.sum(_norm(plans[:, 1:] - plans[:, :-1]), axis=-1)


def smoothness(plans: Array, start: Array, goal: Array) -> jax.Array:  # [B]
  """Minus the sum of the squared second differences, at most 0; 0 is straight, at one speed."""
  del start, goal
  bends = plans[:, 2:] - 2.0 * plans[:, 1:-1] + plans[:, :-2]
  return -jnp.sum(jnp.square(bends), axis=(1, 2))


def end_distance(plans: Array, start: Array, goal: Array) -> jax.Array:  # [B]
  """The distance of the first way point from the start plus that of the last from the goal."""
  return _norm(plans[:, 0] - start) + _norm(plans[:, -1] - goal)


def success(plans: Array, start: Array, goal: Array) -> jax.Array:  # [B]
  """1.0 where both ends are within TOLERANCE and no segment enters an obstacle, else 0.0."""
  starts = _norm(plans[:, 0] - start) <= TOLERANCE
  arrives = _norm(plans[:, -1] - goal) <= TOLERANCE
  return (starts & arrives & _is_free(plans)).astype(jnp.float32)


def _is_free(plans: Array) -> jax.Array:  # [B, H, 2] -> bool [B]
  return jnp.all(rim_distances(plans) >= 0.0, axis=(1, 2))


def _norm(x: Array) -> jax.Array:  # [..., 2] -> [...]
  """The Euclidean norm, with a gradient of 0 where the vector is 0 and not a NaN."""
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + 1e-12)


# Demonstrations


def demonstrate(
  rng: np.random.Generator,
  start: np.ndarray,
  goal: np.ndarray,
  *,
  care: float = 0.9,
  num_tries: int = 16,
) -> np.ndarray:
  """Plans of mixed quality, float32 `[B, H, 2]`: detours to either side, wiggly, some in obstacles.

  Args:
    rng: draws everything.
    start, goal: `[B, 2]`; a plan begins and ends there exactly.
    care: the share of demonstrators who take the first of their ideas that is free of obstacles;
      the others take their first idea.
    num_tries: ideas of each demonstrator. With none that is free, it is the first after all.
  """
  ideas = _ideas(rng, np.repeat(start, num_tries, axis=0), np.repeat(goal, num_tries, axis=0))
  free = np.asarray(_is_free(ideas)).reshape(-1, num_tries)
  careful = rng.random(len(free)) < care
  chosen = np.where(careful, free.argmax(axis=1), 0)
  return ideas.reshape(-1, num_tries, HORIZON, 2)[np.arange(len(free)), chosen]


def _ideas(rng: np.random.Generator, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
  """A straight line, bent by slow waves across it and shaken by fast ones; float32 `[N, H, 2]`."""
  along = goal - start
  across = np.stack([-along[:, 1], along[:, 0]], axis=1)
  across /= np.linalg.norm(across, axis=1, keepdims=True)
  time = np.linspace(0.0, 1.0, HORIZON)
  waves = np.sin(np.pi * np.arange(1, 7)[:, None] * time)  # [6, H], all 0 at both ends
  bend = np.stack(
    [rng.uniform(-0.8, 0.8, len(along)), 0.15 * rng.standard_normal(len(along))], axis=1
  )
  shake = rng.uniform(0.0, 0.06, (len(along), 1, 1)) * rng.standard_normal((len(along), 4, 2))
  line = start[:, None] + time[:, None] * along[:, None]
  bent = line + (bend @ waves[:2])[..., None] * across[:, None]
  plans = bent + np.einsum("nfd,fh->nhd", shake, waves[2:])
  return np.clip(plans, -1.0, 1.0).astype(np.float32)
