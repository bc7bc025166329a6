"""What a run draws: grids of images with their prompts, and the curve of its rewards."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4  # pixels between cells
LINE = 12  # pixels of a line of text
MIN_CELL = 128  # small images are enlarged by a whole factor to at least this many pixels


def grid(images: np.ndarray, captions: Sequence[str], columns: int) -> Image.Image:
  """Images `[N, H, W, 3]` in [0, 1], row by row, each above its caption."""
  scale = max(1, -(-MIN_CELL // images.shape[2]))
  height, width = images.shape[1] * scale, images.shape[2] * scale
  rows = -(-len(images) // columns)
  cell_height, cell_width = height + 2 * LINE + MARGIN, width + MARGIN
  canvas = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
  draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
  for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
    left, top = index % columns * cell_width, index // columns * cell_height
    tile = Image.fromarray(to_uint8(image)).resize((width, height), Image.Resampling.NEAREST)
    canvas.paste(tile, (left, top))
    for number, line in enumerate(_wrap(caption, width, draw, font)[:2]):
      draw.text((left, top + height + number * LINE), line, fill="black", font=font)
  return canvas


def before_and_after(
  before: np.ndarray, after: np.ndarray, captions: Sequence[str], columns: int
) -> Image.Image:
  """Pairs of rows: the base model above, the aligned model below, on the same noise."""
  cells, labels = [], []
  for start in range(0, len(before), columns):
    part = slice(start, start + columns)
    for name, images in (("before", before[part]), ("after", after[part])):
      empty = columns - len(images)  # a short last row is filled, so that its pair lies below it
      cells += [*images, *[np.ones_like(before[0])] * empty]
      labels += [f"{name}: {caption}" for caption in captions[part]] + [""] * empty
  return grid(np.stack(cells), labels, columns)


def to_uint8(images: np.ndarray) -> np.ndarray:
  """[0, 1] to 0..255, rounded."""
  return np.round(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)


def _wrap(text: str, width: int, draw: ImageDraw.ImageDraw, font) -> list[str]:
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if draw.textlength(longer, font=font) > width and lines[-1]:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def save_curve(records: Sequence[Mapping[str, float]], path: pathlib.Path) -> None:
  """Plots what was trained on, and all that was evaluated on validation prompts, over iterations.

  Each has a panel of its own: their scales have nothing in common, and a proxy that rises while
  another reward falls is seen at once. A method without rewards shows its loss in their place.
  """
  import matplotlib.figure

  known = {name for record in records for name in record}
  trained = "reward/mean" if "reward/mean" in known else "loss/total"
  names = [trained, *sorted(name for name in known if name.startswith("eval/"))]
  columns = min(3, len(names))
  rows = -(-len(names) // columns)
  figure = matplotlib.figure.Figure(figsize=(3.6 * columns, 2.4 * rows), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False).flatten()
  for name, axes in zip(names, panels, strict=False):
    axes.plot(*_series(records, name), linewidth=1.0, marker=None if name == trained else "o")
    axes.set_title(name.replace("eval/", "validation "), fontsize="medium")
    axes.grid(alpha=0.3)
  for axes in panels[len(names) :]:
    axes.set_axis_off()
  figure.supxlabel("iteration")
  figure.savefig(path, dpi=120)


def _series(records: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
  found = [record for record in records if name in record]
  return [record["step"] + 1 for record in found], [record[name] for record in found]
