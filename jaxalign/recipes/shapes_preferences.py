"""Preferences of the embedded world: pairs of images of its model, compared by its judge.

  python -m jaxalign.recipes.shapes_preferences --output=preferences/train
  python -m jaxalign.recipes.shapes_preferences --output=preferences/held_out \
    --split=held_out --seed=1

Writes `pairs.parquet`, in the format of `preference_files` and with the judge's true scores as an
extra column `judge`, and `about.json`. Both are a function of the flags alone; the noise of the
images depends on the seed and the microbatch.
"""

import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from jaxalign import checks, files, streams, system
from jaxalign.cli import command, paths
from jaxalign.data import preference_files
from jaxalign.data import records as records_lib
from jaxalign.modalities import image
from jaxalign.worlds.shapes import judge


def generate(
  *,
  output: str | os.PathLike,
  num_pairs: int,
  seed: int,
  temperature: float,
  tie_margin: float,
  guidance_scale: float,
  num_steps: int,
  eta: float,
  microbatch: int,
  split: str,
) -> dict[str, Any]:
  """Samples, judges, labels and writes `num_pairs` pairs; returns what about.json says.

  The label is one draw of `choice_probabilities` of the judge's scores: 1 the first is better, 0
  the second, 0.5 a tie. `accuracy_ceiling` is the share of choices that one who knows the scores
  would get right, ties left out.
  """
  settings = {name: value for name, value in locals().items() if name != "output"}
  if num_pairs < 1 or microbatch < 1 or not 0 < temperature < np.inf or not tie_margin >= 0:
    raise ValueError(
      "expected num_pairs and microbatch of at least 1, a temperature above 0 and a tie_margin of "
      f"at least 0, got {num_pairs}, {microbatch}, {temperature} and {tie_margin}"
    )
  checks.check_seed("seed", seed)
  # Both can fail, and had better do so before an hour of sampling.
  preference_files.import_pyarrow()
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)

  prompt_set = records_lib.load(f"shapes/{split}")
  drawn = prompt_set.draw(streams.generator(seed, "preference prompts"), num_pairs)
  prompts = [record["prompt"] for record in prompt_set[drawn]]
  process = {"transition": "ddim", "num_steps": num_steps, "eta": eta}
  pairs = _sample(prompts, seed, microbatch, process=process, guidance={"scale": guidance_scale})
  images, scores = [], np.zeros((num_pairs, 2))
  # They come in bursts of a microbatch, so time left is told from the mean speed.
  progress = tqdm.tqdm(pairs, "sampling pairs", num_pairs, unit="pair", smoothing=0)
  for row, pair in enumerate(progress):
    images.append([_png(image) for image in pair])
    scores[row] = _judge(pair, prompts[row])
  first, second = choice_probabilities(scores, temperature, tie_margin)
  chosen = streams.generator(seed, "preference labels").random(num_pairs)
  label_0 = np.where(chosen < first, 1.0, np.where(chosen >= 1.0 - second, 0.0, 0.5))

  _write(folder / "pairs.parquet", prompt=prompts, images=images, label_0=label_0, judge=scores)
  about = {
    "model": "shapes",
    **settings,
    "accuracy_ceiling": float(np.maximum(first, second).sum() / (first + second).sum()),
    "ties": float((label_0 == 0.5).mean()),
    "equal_scores": float((scores[:, 0] == scores[:, 1]).mean()),
  }
  files.write_json(folder / "about.json", about)
  return about


def choice_probabilities(
  scores: np.ndarray, temperature: float, tie_margin: float
) -> tuple[np.ndarray, np.ndarray]:
  """P(first chosen) and P(second chosen), `[N]` each, of scores `[N, 2]`; the rest is a tie.

    P(first) = sigmoid((s_0 - s_1) / temperature - tie_margin)

  Bradley & Terry 1952 at a margin of 0; else with the ties of Rao & Kupper 1967, whose threshold
  is exp(tie_margin).
  """
  d = (scores[:, 0] - scores[:, 1]) / temperature
  # As a tanh, which no temperature makes overflow.
  first, second = (0.5 + 0.5 * np.tanh(0.5 * (x - tie_margin)) for x in (d, -d))
  return first, second


def _sample(
  prompts: Sequence[str], seed: int, microbatch: int, **sections: Any
) -> Iterator[np.ndarray]:
  """Two images of each prompt, uint8 `[2, H, W, 3]`."""
  name = streams.number("preference images")
  sys = system.make_system(seed=0, model={"path": "shapes"}, lora=system.NO_LORA, **sections)
  for j, start in enumerate(range(0, len(prompts), microbatch)):
    part = prompts[start : start + microbatch]
    # The last microbatch is filled up, so that no second program is compiled.
    filled = [*part, *[part[-1]] * (microbatch - len(part))]
    tokens = sys.model.tokenize([{"prompt": prompt} for prompt in filled])
    first, second = (
      np.asarray(
        sys.sample_fn(
          sys.policy.params, sys.frozen, tokens, seed, name, i, j, None, sys.pipeline.table
        ).samples
      )
      for i in range(2)
    )
    yield from image.to_uint8(np.stack([first, second], axis=1)[: len(part)])


def _judge(pair: np.ndarray, prompt: str) -> list[float]:
  return [judge.judge(image, prompt).score for image in pair]


def _png(image: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return buffer.getvalue()


def _write(file: pathlib.Path, **columns: Iterable) -> None:
  pyarrow = preference_files.import_pyarrow()
  table = pyarrow.table({name: list(values) for name, values in columns.items()})
  with files.replacing(file) as temporary:
    pyarrow.parquet.write_table(table, temporary)


def generate_by_flags() -> None:
  """Defines the flags, which an import of this file does not, and generates what they say."""
  from absl import flags

  holders = (
    paths.define("output", None, "Folder to write to; made if needed.", required=True),
    flags.DEFINE_integer("num_pairs", 4096, "Pairs of images; prompts are used several times."),
    flags.DEFINE_integer("seed", 0, "Of prompts, noise and labels."),
    flags.DEFINE_float("temperature", 0.1, "Of the labels; near 0 the better image always wins."),
    flags.DEFINE_float("tie_margin", 2.0, "How readily close pairs are ties; 0 is never."),
    flags.DEFINE_float("guidance_scale", 1.0, "Classifier-free guidance; 1 is none."),
    flags.DEFINE_integer("num_steps", 8, "Denoising steps."),
    flags.DEFINE_float("eta", 1.0, "DDIM's noise, 0 to 1."),
    flags.DEFINE_integer("microbatch", 64, "Images sampled at once."),
    flags.DEFINE_enum("split", "train", ["train", "held_out"], "Of the prompts of the grammar."),
  )

  def main(argv):
    del argv
    about = generate(**{holder.name: holder.value for holder in holders})
    for name, value in about.items():
      print(f"{name:20}{value}")

  command.run(main)


if __name__ == "__main__":
  generate_by_flags()
