"""`python -m jaxalign.sample`, and its pictures against diffusers' own pipeline."""

import jax
import numpy as np
import pytest
from absl import flags

from jaxalign import sample, system
from jaxalign.cli import command
from jaxalign.models.weights import hub


@pytest.mark.parametrize(
  "guidance_scale,num_steps,negative", [(5.0, 12, "a red circle"), (1.0, 7, None)]
)
def test_the_embedded_model_gives_the_same_image_in_diffusers(
  guidance_scale, num_steps, negative
):
  """Same folder, prompt, initial latents, steps and guidance, DDIM without noise."""
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  latents = np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype(np.float32)
  prompts = ["a purple ring above a cross", "three squares"]

  sys_ = system.make_system(
    seed=0,
    model={"path": "shapes"},
    lora=system.NO_LORA,
    process={"transition": "ddim", "num_steps": num_steps, "eta": 0.0},
    guidance={"scale": guidance_scale},
  )
  if negative:
    sys_ = sys_.guided_from({"prompt": negative})
  token_ids, key = sys_.model.tokenize([{"prompt": p} for p in prompts]), jax.random.key(0)
  args = (token_ids, latents, key, sys_.pipeline.table)
  ours = jax.jit(sys_.sample)(sys_.policy.params, sys_.frozen, *args)

  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
    hub.find_folder("shapes"), safety_checker=None
  )
  pipeline.set_progress_bar_config(disable=True)
  theirs = pipeline(
    prompts,
    negative_prompt=negative and [negative] * 2,
    latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)),
    num_inference_steps=num_steps,
    guidance_scale=guidance_scale,
    eta=0.0,
    height=64,
    width=64,
    output_type="np",
  ).images
  assert np.abs(np.asarray(ours.samples) - theirs).max() < 1e-3
  assert np.asarray(ours.samples).std() > 0.05  # two flat pictures would agree too


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--model=shapes", "--prompt=a ring", "--guidance_scale=1"), "a --guidance_scale above 1"),
    (
      ("--model=planner", "--record={}", "--guidance_scale=2"),
      'a model of prompts; record 0: expected a "start"',
    ),
  ],
)
def test_a_negative_prompt_that_changes_nothing_is_refused(arguments, words):
  values = command.parse(sample.define_flags, *arguments, "--negative_prompt=a cross")
  with pytest.raises(flags.Error, match=f"--negative_prompt: expected .*{words}"):
    sample.load_system(values)
