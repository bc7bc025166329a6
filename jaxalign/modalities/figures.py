"""Figures of matplotlib as pictures, without pyplot, whose figures would live for ever."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
  from matplotlib.figure import Figure

DPI = 100
# The base model and the aligned one, told apart in black and white too.
COLORS = {"before": "tab:gray", "after": "tab:orange"}
DEFAULT_COLOR = "tab:blue"


def make(width: float, height: float) -> "Figure":
  """An empty figure of that many inches, whose panels are laid out to fit."""
  import matplotlib.figure

  return matplotlib.figure.Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def to_image(figure: "Figure") -> Image.Image:
  """The figure, drawn, in RGB."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def group_of(caption: str) -> str:
  """Which model made a sample: "before" or "after" where `before_and_after` says so, or ""."""
  prefix = caption.partition(":")[0]
  return prefix if prefix in COLORS else ""


def color_of(caption: str) -> str:
  """The colour of that model's samples."""
  return COLORS.get(group_of(caption), DEFAULT_COLOR)
