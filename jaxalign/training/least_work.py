"""The least work of a run's programs: what their products would cost if nothing were done twice."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path

from jaxalign import system
from jaxalign.aot import flops
from jaxalign.rewards.contract import DeviceReward


class Programs:
  """The least work of the programs of a config, in operations of all devices together."""

  def __init__(self, sys: system.System, sections: Mapping[str, Any]):
    self.networks = Networks(sys, sections["lora"]["rank"])
    self._steps = sys.process.table.num_steps
    self._branches = 1 if sections["guidance"]["scale"] == 1 else 2
    self._options = dict(sections["method"])
    self._name = self._options.pop("name")

  def rollout(self, images: int) -> float:
    """Texts, every step, and the decoder."""
    chain = self._steps * self._sampled(images).forward
    return self.networks.text(images + 1).forward + chain + self.networks.decode(images).forward

  def encoding(self, pairs: int) -> float:
    """Both images of stored pairs."""
    return self.networks.encode(2 * pairs).forward

  def conditioning(self, prompts: int) -> float:
    """Prompts, and the empty one."""
    return self.networks.text(prompts + 1).forward

  def update(
    self, examples: int, device: DeviceReward | None = None, features: Any = None
  ) -> float | None:
    """One gradient slice of so many images, pairs or prompts; None for a method of one's own.

    `device` and `features` `[m, ...]`, of any number of prompts, are of methods that differentiate
    a reward.
    """
    options, name = self._options, self._name
    if name in ("ddpo", "ddpo_sf"):
      unet = self._sampled(examples)
      reference = self._reference(examples) if options["kl_weight"] else 0.0
      return unet.gradient + reference
    if name == "d3po":
      return self._sampled(2 * examples).gradient + self._reference(2 * examples)
    if name in ("dpo", "ipo"):  # without guidance
      rows = 2 * examples * options["num_draws"]
      return self.networks.unet(rows).gradient + self.networks.reference(rows).forward
    window = self._window()
    if window is None or device is None:
      return None
    before, through, last = window
    step = self._sampled(examples)
    ends = examples * last
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((ends, *leaf.shape[1:]), leaf.dtype), features
    )
    return (
      before * step.forward
      + through * self._sampled(ends).gradient
      + self.networks.decode(ends, through_input=True).gradient
      + self.networks.reward(device, shapes).gradient
      + (through * self._reference(examples) if options.get("kl_weight") else 0.0)
    )

  def _window(self) -> tuple[float, float, int] | None:
    """Of a method that differentiates a reward: steps without a gradient, steps with one (both on
    average), and the samples that the latter are taken for, of each prompt.
    """
    steps, options = self._steps, self._options
    if self._name == "draft":
      through = options["num_grad_steps"] or steps
      return steps - through, through, 1
    if self._name == "align_prop":
      through = min(max(1.0, options["mean_grad_steps"]), max(1, steps - 1))
      return steps - through, through, 1
    if self._name == "draft_lv":
      return steps, 1, options["num_noises"]
    if self._name == "refl":
      return self.unknown_trips(), 1, 1
    return None

  def unknown_trips(self) -> int:
    """Passes of the loop of an update whose number is drawn when it runs, on average; or 1.

    It is ReFL's: the steps before the one that is differentiated.
    """
    if self._name != "refl":
      return 1
    first, last = (round(share * self._steps) for share in self._options["step_range"])
    return (first + last - 1) // 2

  def _sampled(self, images: int) -> flops.Minimum:
    return self.networks.unet(self._branches * images)

  def _reference(self, images: int) -> float:
    return self.networks.reference(self._branches * images).forward


class Networks:
  """The least work of each network of a system on a batch, in operations of all devices together.

  rank: of the adapters, 0 where weights are trained.
  """

  def __init__(self, sys: system.System, rank: int):
    self._model, self._rank = sys.model, rank
    params = sys.policy.params
    paths = tree_flatten_with_path(params.get("lora", params.get("params")))[0]
    self._changed = {"/".join(key.key for key in path[:-1]) for path, _ in paths}
    self._params = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._model.params
    )

  def unet(self, batch: int) -> flops.Minimum:
    chosen = {"adapted": self._changed, "rank": self._rank}
    return self._unet(batch, **(chosen if self._rank else {"trained": self._changed}))

  def reference(self, batch: int) -> flops.Minimum:
    return self._unet(batch)

  def _unet(self, batch: int, **chosen: Any) -> flops.Minimum:
    model = self._model
    cond = jax.eval_shape(model.encode_text, self._params, self._ids(batch))
    x_t = jax.ShapeDtypeStruct((batch, *model.latent_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((batch,), jnp.float32)

    def denoise(params, x_t, t, cond):
      return model.denoise({"params": params}, x_t, t, cond)

    return flops.minimum(denoise, self._params["unet"], x_t, t, cond, **chosen)

  def text(self, batch: int) -> flops.Minimum:
    texts = {name: self._params[name] for name in self._model.networks.text.modules}
    return flops.minimum(self._model.encode_text, texts, self._ids(batch))

  def decode(self, batch: int, **chosen: Any) -> flops.Minimum:
    latents = jax.ShapeDtypeStruct((batch, *self._model.latent_shape), jnp.float32)
    return flops.minimum(self._model.decode, self._params["vae"], latents, **chosen)

  def encode(self, batch: int) -> flops.Minimum:
    return flops.minimum(self._model.encode_images, self._params["vae"], self._images(batch))

  def reward(self, device: DeviceReward, features: Any) -> flops.Minimum:
    """With its gradient in the images; `features` `[B, ...]` are arrays or shapes."""
    batch = len(jax.tree.leaves(features)[0])
    images = self._images(batch)
    return flops.minimum(device.score, device.params, images, features, through_input=True)

  def _images(self, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *self._model.image_size, 3), jnp.float32)

  def _ids(self, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *self._model.networks.text.ids_shape), jnp.int32)
