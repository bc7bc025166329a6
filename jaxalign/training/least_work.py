"""The least work of a run's programs: what their products would cost if nothing were done twice."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path

from jaxalign import streams, system
from jaxalign.aot import flops
from jaxalign.diffusion import guidance
from jaxalign.models.model import Tokens
from jaxalign.rewards.contract import DeviceReward


class Programs:
  """The least work of the programs of a config, in operations of all devices together.

  Of programs that sample under a guidance of one's own it is not known, and None: only that says
  how often it asks the network.
  """

  def __init__(self, sys: system.System, sections: Mapping[str, Any], tokens: Tokens):
    self.networks = Networks(sys, sections["lora"]["rank"], tokens)
    self._steps = sys.process.table.num_steps
    self._branches = guidance.count_branches(**sys.guidance)
    self._options = dict(sections["method"])
    self._name = self._options.pop("name")

  def rollout(self, samples: int) -> float | None:
    """Conditions, every step, and the decoder."""
    if self._branches is None:
      return None
    chain = self._steps * self._sampled(samples).forward
    ends = self.networks.condition(samples + 1).forward + self.networks.decode(samples).forward
    return chain + ends

  def encoding(self, pairs: int) -> float:
    """Both samples of stored pairs."""
    return self.networks.encode(2 * pairs).forward

  def conditioning(self, records: int) -> float:
    """Records, and the empty condition."""
    return self.networks.condition(records + 1).forward

  def update(
    self, examples: int, device: DeviceReward | None = None, query: Any = None
  ) -> float | None:
    """One gradient slice of so many samples, pairs or records; None for a method of one's own.

    `device` and `query` `[m, ...]`, of any number of records, are of methods that differentiate
    a reward.
    """
    options, name = self._options, self._name
    if name in ("dpo", "ipo"):  # without guidance
      rows = 2 * examples * options["num_draws"]
      return self.networks.denoiser(rows).gradient + self.networks.reference(rows).forward
    if self._branches is None:
      return None
    if name in ("ddpo", "ddpo_sf"):
      denoiser = self._sampled(examples)
      reference = self._reference(examples) if options["kl_weight"] else 0.0
      return denoiser.gradient + reference
    if name == "d3po":
      return self._sampled(2 * examples).gradient + self._reference(2 * examples)
    window = self._window()
    if window is None or device is None:
      return None
    before, through, last = window
    step = self._sampled(examples)
    ends = examples * last
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((ends, *leaf.shape[1:]), leaf.dtype), query
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
    average), and the samples that the latter are taken for, of each record.
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

  def _sampled(self, samples: int) -> flops.Minimum:
    assert self._branches is not None  # whoever asks has looked
    return self.networks.denoiser(self._branches * samples)

  def _reference(self, samples: int) -> float:
    assert self._branches is not None
    return self.networks.reference(self._branches * samples).forward


class Networks:
  """The least work of each network of a system on a batch, in operations of all devices together.

  rank: of the adapters, 0 where weights are trained.
  tokens: of any records, for their shapes.
  """

  def __init__(self, sys: system.System, rank: int, tokens: Tokens):
    self._model, self._rank, self._example = sys.model, rank, tokens
    self._denoise_fn = sys.pipeline.conditional.denoise_fn  # one that is told its scale is told it
    params = sys.policy.params
    paths = tree_flatten_with_path(params.get("lora", params.get("params")))[0]
    self._changed = {"/".join(key.key for key in path[:-1]) for path, _ in paths}
    self._params = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._model.params
    )

  def denoiser(self, batch: int) -> flops.Minimum:
    chosen = {"adapted": self._changed, "rank": self._rank}
    return self._denoiser(batch, **(chosen if self._rank else {"trained": self._changed}))

  def reference(self, batch: int) -> flops.Minimum:
    return self._denoiser(batch)

  def _denoiser(self, batch: int, **chosen: Any) -> flops.Minimum:
    model = self._model
    cond = jax.eval_shape(model.condition, self._others, self._tokens(batch))
    x_t = jax.ShapeDtypeStruct((batch, *model.latent_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((batch,), jnp.float32)

    def denoise(params, x_t, t, cond):
      return self._denoise_fn({"params": params}, x_t, t, cond)

    return flops.minimum(denoise, self._params["denoiser"], x_t, t, cond, **chosen)

  def condition(self, batch: int) -> flops.Minimum:
    return flops.minimum(self._model.condition, self._others, self._tokens(batch))

  def decode(self, batch: int, **chosen: Any) -> flops.Minimum:
    latents = jax.ShapeDtypeStruct((batch, *self._model.latent_shape), jnp.float32)
    return flops.minimum(self._model.decode, self._others, latents, **chosen)

  def encode(self, batch: int) -> flops.Minimum:
    args = (self._samples(batch), streams.key_shape())
    return flops.minimum(self._model.encode, self._others, *args)

  def reward(self, device: DeviceReward, query: Any) -> flops.Minimum:
    """With its gradient in the samples; `query` `[B, ...]` are arrays or shapes."""
    samples = self._samples(len(jax.tree.leaves(query)[0]))
    return flops.minimum(device.score, device.params, samples, query, through_input=True)

  @property
  def _others(self) -> Mapping[str, Any]:
    return {name: tree for name, tree in self._params.items() if name != "denoiser"}

  def _samples(self, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *self._model.sample_shape), jnp.float32)

  def _tokens(self, batch: int) -> Any:
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), self._example
    )
