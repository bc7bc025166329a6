"""Finds the well-formed shapes of an image by measurement alone; nothing here is learned.

The ground is the most frequent ground colour. What differs from it falls into connected
components; a component counts as an object only when its colour is one of the palette and is
uniform, and when its outline agrees with exactly one ideal shape. Everything else that differs
from the ground is counted as unexplained.

The distances below are Euclidean in RGB over [0, 1]. They follow from the palette: an object is
at least 0.5 from every ground and 0.47 from other objects, grounds are 0.36 apart.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from jaxalign.worlds.shapes import scene

NAMES = tuple(scene.COLOURS)
OBJECT_RGB = np.array(list(scene.COLOURS.values()), np.float32) / 255
GROUND_RGB = np.array(list(scene.GROUNDS.values()), np.float32) / 255

MAX_COLOUR_ERROR = 0.22  # less than half the distance to any other colour or to a faded one
MAX_GROUND_ERROR = 0.18
MIN_GROUND_SHARE = 0.5  # of all pixels; the fullest scene leaves 0.65
MAX_GROUND_PIXEL_ERROR = 0.3
FOREGROUND = 0.25  # distance from the ground: half of the least contrast of an object
SMOOTH_FOREGROUND = 0.18  # the same for 3 x 3 means, whose noise is three times smaller
MAX_MARKED = 5  # pixels inside that are further than SPREAD from the colour, or missing
SPREAD = 0.3
MIN_INTERIOR = 9  # pixels
SIZE_RANGE = (11.0, 31.0)  # pixels
MAX_RESIDUAL = 0.11  # rendered shapes stay below 0.04; a square that lacks a quarter starts at 0.13
MIN_MARGIN = 0.01
MAX_DEFECT = 0.02  # share of the area missing inside, or sticking out, by more than a pixel
WINDOW = 48  # side of a template, pixels
TEMPLATE_BLUR = 0.6  # pixels: between a rendered edge and a blurred one
MAX_CANDIDATES = 3  # shapes whose fit is refined
MAX_CLIMB = 4
_STEPS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
_CROSS = ndimage.generate_binary_structure(2, 1)
_BLOCK = ndimage.generate_binary_structure(2, 2)


@dataclasses.dataclass(frozen=True)
class Found:
  """A well-formed object: centre and size in pixels, and how well the outline fits.

  `residual` is the squared distance from the ideal shape over the ideal's square, 0 for a perfect
  fit; `margin` is how much larger it is for the next best shape.
  """

  shape: str
  colour: str
  x: float
  y: float
  size: float
  residual: float
  margin: float


@dataclasses.dataclass(frozen=True)
class Detection:
  """`ground` is None when no ground colour covers half of the image; then nothing is found."""

  ground: str | None
  objects: tuple[Found, ...]
  unexplained: int  # pixels that are neither ground nor part of a found object


@functools.cache
def _moments(shape: str) -> tuple[float, float]:
  """Area over the bounding square's, and how far the centroid is below its centre, in sizes."""
  mask = scene.coverage(shape, 32, 32, 60)
  rows = np.arange(len(mask)) + 0.5
  return float(mask.sum() / 60**2), float((mask.sum(1) @ rows / mask.sum() - 32) / 60)


@functools.cache
def _soft(shape: str, half_sizes: int, quarter_x: int, quarter_y: int) -> tuple[np.ndarray, float]:
  """An ideal shape, slightly blurred, as flat float32 `[WINDOW ** 2]`, and its sum of squares.

  The centroid is (quarter_x, quarter_y) / 4 pixels off the middle and the size half_sizes / 2;
  steps that coarse keep the table of templates small.
  """
  size = half_sizes / 2
  x, y = WINDOW / 2 + quarter_x / 4, WINDOW / 2 + quarter_y / 4 - _moments(shape)[1] * size
  ideal = ndimage.gaussian_filter(scene.coverage(shape, x, y, size, WINDOW), TEMPLATE_BLUR).ravel()
  return ideal, float(ideal @ ideal)


@functools.cache
def _bounds(*parameters: str | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The template's mask one pixel smaller, one and two pixels larger: bool `[WINDOW, WINDOW]`."""
  ideal = _soft(*parameters)[0].reshape(WINDOW, WINDOW) > 0.5
  larger = ndimage.binary_dilation(ideal, _CROSS)
  return ndimage.binary_erosion(ideal, _CROSS), larger, ndimage.maximum_filter(larger, 3)


def _distance(seen: np.ndarray, parameters: tuple) -> float:
  """Squared distance of `seen [WINDOW ** 2]` from a template, less the square of `seen`.

  What is left out is common to all templates; differences are log-likelihood ratios under noise.
  """
  ideal, square = _soft(*parameters)
  return square - 2 * float(seen @ ideal)


def _climb(seen: np.ndarray, start: tuple) -> tuple[float, tuple]:
  """(distance, parameters) of the template nearest to `seen`, in steps from `start`."""
  best, shortest = start, _distance(seen, start)
  for _ in range(MAX_CLIMB):
    shape, size, x, y = best
    steps = [(shape, size + s, x + i, y + j) for s, i, j in _STEPS]
    distances = [_distance(seen, parameters) for parameters in steps]
    if min(distances) >= shortest:
      break
    shortest = min(distances)
    best = steps[distances.index(shortest)]
  return shortest, best


def _colour(pixels: np.ndarray) -> int | None:
  """Index of the palette colour of interior pixels `[N, 3]`, None if off palette or not uniform."""
  centre = np.median(pixels, 0)
  errors = np.linalg.norm(OBJECT_RGB - centre, axis=-1)
  nearest = int(errors.argmin())
  marked = np.count_nonzero(np.linalg.norm(pixels - centre, axis=-1) > SPREAD)
  if errors[nearest] > MAX_COLOUR_ERROR or marked > MAX_MARKED:
    return None
  return nearest


def _squared_distance(pixels: np.ndarray, rgb: np.ndarray) -> np.ndarray:
  """Of colours `[..., 3]` from one colour: `[...]`."""
  difference = pixels - rgb
  return np.einsum("...c,...c->...", difference, difference)  # sum(-1) is slow on a short axis


def _core(image: np.ndarray, ground: np.ndarray, component: np.ndarray) -> np.ndarray:
  """Colour `[3]` of the half of a component's pixels that differ most from the ground."""
  pixels = image[component]
  distance = _squared_distance(pixels, ground)
  return np.median(pixels[distance >= np.median(distance)], 0)


def _alpha(image: np.ndarray, ground: np.ndarray, colour: np.ndarray) -> np.ndarray:
  """How far each pixel `[..., 3]` is on the way from the ground (0) to the colour (1)."""
  contrast = colour - ground
  return (image - ground) @ contrast / (contrast @ contrast)


def _match(alpha: np.ndarray, mask: np.ndarray) -> tuple | None:
  """(parameters, residual, margin, reach) of a clean shape, or None.

  Args:
    alpha: float32 `[WINDOW, WINDOW]`, how much of the object's colour each pixel has.
    mask: bool of that shape, its centroid within a pixel of the middle.
  """
  rows, columns = np.nonzero(mask)
  area = len(rows)
  x, y = (round(4 * (v.mean() + 0.5 - WINDOW / 2)) for v in (columns, rows))
  sizes = {shape: np.sqrt(area / _moments(shape)[0]) for shape in scene.SHAPES}
  starts = [
    (shape, round(2 * size), x, y)
    for shape, size in sizes.items()
    if SIZE_RANGE[0] <= size <= SIZE_RANGE[1]
  ]
  if len(starts) < 2:
    return None
  seen = alpha.ravel()
  starts = sorted(starts, key=lambda start: _distance(seen, start))[:MAX_CANDIDATES]
  ranked = sorted(_climb(seen, start) for start in starts)
  (shortest, best), (runner_up, _) = ranked[:2]
  square = _soft(*best)[1]
  residual, margin = (shortest + float(seen @ seen)) / square, (runner_up - shortest) / square
  smaller, larger, reach = _bounds(*best)
  defect = max(np.count_nonzero(smaller & ~mask), np.count_nonzero(mask & ~larger))
  if residual > MAX_RESIDUAL or margin < MIN_MARGIN or defect > min(MAX_DEFECT * area, MAX_MARKED):
    return None
  return best, residual, margin, reach


def _frame(values: np.ndarray, row: int, column: int) -> np.ndarray:
  """Zeros `[WINDOW, WINDOW]` around `values [H, W]`; their (row, column) is the frame's corner."""
  frame = np.zeros((WINDOW, WINDOW), values.dtype)
  frame[-row : values.shape[0] - row, -column : values.shape[1] - column] = values
  return frame


def _measure(image: np.ndarray, ground: np.ndarray, component: np.ndarray) -> tuple | None:
  """(Found, its reach, the corner of that) for a component, or None if it is not a clean shape.

  Args:
    image: `[H, W, 3]`, the part of the image that bounds the component, and up to 2 pixels more.
    ground: `[3]`.
    component: bool `[H, W]`.
  """
  alpha = _alpha(image, ground, _core(image, ground, component)).clip(0, 1)
  # A pixel half covered is where the outline is, whatever the contrast and the blur.
  mask = (alpha > 0.5) & component
  interior = ndimage.binary_erosion(mask, _CROSS)
  if np.count_nonzero(interior) < MIN_INTERIOR:
    return None
  colour = _colour(image[interior])
  rows, columns = np.nonzero(mask)
  row, column = (int(v.mean() + 0.5) - WINDOW // 2 for v in (rows, columns))
  fits = (
    max(row, column) <= 0
    and min(row + WINDOW - mask.shape[0], column + WINDOW - mask.shape[1]) >= 0
  )
  if colour is None or not fits:
    return None
  alpha = alpha * ndimage.maximum_filter(component, 5)
  matched = _match(_frame(alpha, row, column), _frame(mask, row, column))
  if matched is None:
    return None
  (shape, *parameters), residual, margin, reach = matched
  size, x, y = np.divide(parameters, (2, 4, 4))
  x, y = column + WINDOW / 2 + x, row + WINDOW / 2 + y - _moments(shape)[1] * size
  return Found(shape, NAMES[colour], x, y, size, residual, margin), reach, (row, column)


def _find_ground(smooth: np.ndarray) -> tuple[int, np.ndarray] | None:
  """(index, RGB as seen) of the ground of 3 x 3 means `[64, 64, 3]`, or None."""
  pixels = smooth[::2, ::2].reshape(-1, 3)  # neighbouring means say nearly the same
  errors = np.stack([_squared_distance(pixels, rgb) for rgb in GROUND_RGB])
  nearest = np.where(errors.min(0) < MAX_GROUND_PIXEL_ERROR**2, errors.argmin(0), len(GROUND_RGB))
  index = int(np.bincount(nearest, minlength=len(GROUND_RGB) + 1)[:-1].argmax())
  members = pixels[nearest == index]
  if len(members) < MIN_GROUND_SHARE * len(pixels):
    return None
  rgb = np.median(members, 0)
  if np.linalg.norm(rgb - GROUND_RGB[index]) > MAX_GROUND_ERROR:
    return None
  return index, rgb


def detect(image: np.ndarray) -> Detection:
  """All well-formed objects of a float32 image `[64, 64, 3]` in [0, 1]."""
  smooth = ndimage.uniform_filter(image, (3, 3, 1), mode="nearest")
  ground = _find_ground(smooth)
  if ground is None:
    return Detection(None, (), image.shape[0] * image.shape[1])
  index, rgb = ground
  foreground = _squared_distance(image, rgb) > FOREGROUND**2
  labels, _ = ndimage.label(foreground, _BLOCK)  # touching corners join: a board is one component
  explained = np.zeros(np.add(foreground.shape, 2 * WINDOW), bool)
  objects = []
  for label, box in enumerate(ndimage.find_objects(labels), 1):
    sides = [part.stop - part.start for part in box]
    if max(sides) > SIZE_RANGE[1] + 2 or min(sides) < SIZE_RANGE[0] - 2:
      continue
    top, left = (max(0, part.start - 2) for part in box)
    box = slice(top, box[0].stop + 2), slice(left, box[1].stop + 2)
    measured = _measure(image[box], rgb, labels[box] == label)
    if measured is not None:
      found, reach, (row, column) = measured
      objects.append(dataclasses.replace(found, x=found.x + left, y=found.y + top))
      row, column = row + top + WINDOW, column + left + WINDOW
      explained[row : row + WINDOW, column : column + WINDOW] |= reach
  visible = _squared_distance(smooth, rgb) > SMOOTH_FOREGROUND**2
  unexplained = int(np.count_nonzero(visible & ~explained[WINDOW:-WINDOW, WINDOW:-WINDOW]))
  return Detection(tuple(scene.GROUNDS)[index], tuple(objects), unexplained)
