"""Scenes of coloured shapes, and the renderer that turns one into a 64 x 64 image.

Coordinates are in pixels: x to the right, y down, pixel (row i, column j) covers
[j, j + 1] x [i, i + 1], so the image spans [0, 64] on both axes.
"""

import dataclasses

import numpy as np

IMAGE_SIZE = 64
SUPERSAMPLING = 4  # samples per pixel and axis

# RGB in 0..255. With channels over [0, 1], object colours are at least 0.47 apart from each other
# and 0.5 from every ground; grounds are 0.36 apart.
COLOURS = {
  "red": (215, 10, 45),
  "green": (20, 165, 50),
  "blue": (30, 60, 235),
  "yellow": (255, 240, 40),
  "purple": (165, 20, 190),
  "orange": (255, 125, 0),
}
GROUNDS = {
  "white": (245, 245, 245),
  "grey": (140, 140, 145),
  "black": (20, 20, 25),
  "beige": (225, 200, 165),
  "brown": (100, 65, 40),
}


@dataclasses.dataclass(frozen=True)
class Object:
  """A shape whose bounding square has centre (x, y) and side `size`, all in pixels."""

  shape: str
  colour: str
  x: float
  y: float
  size: float


@dataclasses.dataclass(frozen=True)
class Scene:
  ground: str
  objects: tuple[Object, ...]


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return u**2 + v**2 <= 1


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return np.maximum(np.abs(u), np.abs(v)) <= 1


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  return (np.abs(v) <= 1) & (np.abs(u) <= (v + 1) / 2)  # v points down: the apex is on top


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  longer, shorter = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
  return (longer <= 1) & (shorter <= 0.36)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  radius_squared = u**2 + v**2
  return (radius_squared <= 1) & (radius_squared >= 0.5**2)


# Each takes u (right) and v (down), both [-1, 1] across the bounding square, and says "inside".
SHAPES = {
  "circle": _circle,
  "square": _square,
  "triangle": _triangle,
  "cross": _cross,
  "ring": _ring,
}


def coverage(shape: str, x: float, y: float, size: float, extent: int = IMAGE_SIZE) -> np.ndarray:
  """Fraction of every pixel that the shape covers: float32 `[extent, extent]` in [0, 1].

  Estimated from SUPERSAMPLING x SUPERSAMPLING points per pixel. What lies outside is cut off.
  """
  half = size / 2
  left, top = (max(0, int(np.floor(c - half))) for c in (x, y))
  right, bottom = (min(extent, int(np.ceil(c + half))) for c in (x, y))
  result = np.zeros((extent, extent), np.float32)
  if right <= left or bottom <= top:
    return result
  width, height = right - left, bottom - top
  offsets = np.arange(0.5 / SUPERSAMPLING, max(width, height), 1 / SUPERSAMPLING)
  u = (left + offsets[None, : width * SUPERSAMPLING] - x) / half
  v = (top + offsets[: height * SUPERSAMPLING, None] - y) / half
  inside = np.broadcast_to(SHAPES[shape](u, v), (v.shape[0], u.shape[1]))
  blocks = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
  result[top:bottom, left:right] = blocks.mean((1, 3), dtype=np.float32)
  return result


def render(scene: Scene) -> np.ndarray:
  """The scene as an antialiased image, uint8 `[64, 64, 3]`."""
  image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
  image[:] = GROUNDS[scene.ground]
  for item in scene.objects:
    alpha = coverage(item.shape, item.x, item.y, item.size)[..., None]
    image = (1 - alpha) * image + alpha * np.array(COLOURS[item.colour], np.float32)
  return np.round(image).astype(np.uint8)


def apart(first: Object, second: Object) -> float:
  """Free pixels between two bounding squares along the axis that separates them better."""
  distance = max(abs(first.x - second.x), abs(first.y - second.y))
  return distance - (first.size + second.size) / 2
