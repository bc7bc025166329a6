"""What the embedded model is taught from."""

import numpy as np

from jaxalign import streams
from jaxalign.recipes import shapes_model
from jaxalign.worlds.shapes import judge, prompts


def test_no_caption_of_the_pretraining_set_is_a_held_out_prompt(load_config):
  """Those of the config's own seed and error, of which 15 % are wrong on purpose."""
  config = load_config("pretrain_shapes")
  data = {**config.data, "num_images": 3000}
  images, captions = shapes_model.draw_dataset(seed=config.seed, **data)
  held_out = prompts.held_out_prompts()
  assert not set(captions) & {prompt.text for prompt in held_out}
  facts = {prompts.canonical(prompts.parse(caption)) for caption in captions}
  assert not facts & {prompts.canonical(prompt.spec) for prompt in held_out}

  drawn = prompts.sample_prompts(streams.generator(config.seed, "scenes"), len(images), "train")
  right = np.array(captions) == [prompt.text for prompt in drawn]
  assert abs(right.mean() - 0.85) < 5 * 0.0065  # its standard deviation
  for i in (*np.flatnonzero(right)[:20], *np.flatnonzero(~right)[:20]):
    assert judge.judge(images[i], captions[i]).correct == right[i]
