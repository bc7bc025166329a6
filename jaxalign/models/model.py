"""What a model is to everything above it: one value, whatever its family and its samples."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxalign.diffusion import guidance
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Process
from jaxalign.modalities.modality import Modality
from jaxalign.types import Array, DenoiseFn, Key, Params, Record

Tokens = Any  # a tree of numpy arrays [B, ...]


class ModelFiles(NamedTuple):
  """How a model is written for other tools.

  save: `(params, folder)`: writes parameters of all components, with configs and tokenizers as they
    were found. Raises ValueError for a component without parameters.
  adapted: components that adapter files may hold layers of, `{component: its name in such files}`;
    empty where no other tool reads adapters of this family.
  """

  save: Callable[[Mapping[str, Params], pathlib.Path], None]
  adapted: Mapping[str, str]


class Model(NamedTuple):
  """A diffusion or flow model: pure functions, and parameters that they never see unless given.

  params: by component; "denoiser" is the one that is aligned. Leaves are lazy until placed.
  tokenize: `(records) -> tokens`, on the host; a ValueError names the field that a record misses.
  empty: tokens of one example without any condition, for guidance; None: there is no guidance.
  condition: `(params, tokens) -> cond`, pure; leaves `[B, ...]`. `params` may hold more components.
  denoise: `(variables, x_t [B, *D], t [B], cond) -> prediction [B, *D]`, pure; `variables` are
    `{"params": ...}` and, with an adapter, `"lora"`.
  encode: `(params, samples, key) -> x_0 [B, *D]`, pure; the samples themselves where there is no
    autoencoder. Integer samples are as they are stored, floating ones as `decode` makes them.
  decode: `(params, x_0) -> samples`, pure.
  describe: `(record) -> str`: the caption of a picture.
  latent_shape: D.
  sample_shape: of one sample, as `decode` makes it.
  prediction_type: what the network predicts, as `diffusion.predictions` names it.
  levels: every noise level that it was trained on, row 0 nearest to the data.
  make_process: `(**section) -> Process`: the section `process` of a config; a family knows its
    schedule, its shift and the length of its sequences.
  modality: what its samples are.
  guidance: the section `guidance` of a config that says nothing: which of `diffusion.guidance` is
    meant, and the scale that the model's makers take.
  dtype: what the denoiser computes in, by name; None is the dtype of its parameters.
  exact: `denoise`, computed in float32 from the same parameters; None where it is that already.
  stored_dtypes: `(variables) -> dtypes`: what each frozen array of the denoiser is stored in.
  files: how it is written for other tools.
  corrections: what was assumed or corrected when it was opened, a line each.
  """

  params: Mapping[str, Params]
  tokenize: Callable[[Sequence[Record]], Tokens]
  empty: Tokens | None
  condition: Callable[[Mapping[str, Params], Tokens], Any]
  denoise: DenoiseFn
  encode: Callable[[Mapping[str, Params], Array, Key], Array]
  decode: Callable[[Mapping[str, Params], Array], Array]
  describe: Callable[[Record], str]
  latent_shape: tuple[int, ...]
  sample_shape: tuple[int, ...]
  prediction_type: str
  levels: StepTable
  make_process: Callable[..., Process]
  modality: Modality
  files: ModelFiles
  guidance: Mapping[str, Any] = MappingProxyType({"name": guidance.DEFAULT, "scale": 1.0})
  dtype: str | None = None
  exact: DenoiseFn | None = None
  stored_dtypes: Callable[[Params], Params] | None = None
  corrections: tuple[str, ...] = ()
