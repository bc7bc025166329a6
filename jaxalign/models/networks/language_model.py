"""A decoder-only language model as the text encoder of an image model: tokens, files, encoding."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from jaxalign.models import tokenization
from jaxalign.models.networks import decoder
from jaxalign.models.weights import lazy
from jaxalign.types import Array, Params

COMPONENT, _TOKENIZER = "text_encoder", "tokenizer"
# Classes of the tokenizer in a folder's index; all are read from the same files.
TOKENIZERS = (
  *("Qwen2Tokenizer", "Qwen2TokenizerFast", "PixtralProcessor"),
  *("PreTrainedTokenizerFast", "TokenizersBackend"),
)
_TABLE = "embed_tokens.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """The language model of a family, which says what it reads (`texts`) and what is told (`encode`).

  network: stops at the last hidden state that is read.
  length: N, tokens of a prompt with what its template adds; longer ones lose their tail.
  """

  network: decoder.DecoderModel
  length: int

  padding_side = "right"  # of its tokens; None: that of the tokenizer

  @property
  def modules(self) -> dict[str, nn.Module]:
    """The network by the name of its component."""
    return {COMPONENT: self.network}

  def texts(self, folder: str | os.PathLike, prompts: Sequence[str]) -> list[str]:
    """What the network reads of each prompt; `folder` holds the tokenizer."""
    raise NotImplementedError

  def tokens(self, folder: str | os.PathLike, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """`{"ids": [B, N], "mask": [B, N]}`; the mask is False for padding."""
    tokenizer = pathlib.Path(folder) / _TOKENIZER
    ids, mask = tokenization.tokenize_with_mask(
      tokenizer,
      self.texts(tokenizer, prompts),
      self.length,
      num_embeddings=self.network.config.vocab_size,
      kind=tokenization.LANGUAGE_MODEL,
      padding_side=self.padding_side,
    )
    return {"ids": ids, "mask": mask}

  def states(
    self, params: Mapping[str, Params], tokens: Mapping[str, Array]
  ) -> tuple[Array, ...]:
    """The hidden states that are read, `[B, N, D]` each, padding included."""
    variables = {"params": params[COMPONENT]}
    found: Any = self.network.apply(variables, tokens["ids"], tokens["mask"])
    return found


def make_network(
  config: Mapping[str, Any], depths: Sequence[int], width: int
) -> decoder.DecoderModel:
  """The network of a parsed config.json.

  Args:
    config: of the text encoder.
    depths: of the hidden states that are read, as `decoder.DecoderModel` counts; negative ones from
      the last, -1 being that behind the final norm.
    width: what the transformer takes of a token, all states side by side.

  Raises ValueError where the model is not as deep or as wide.
  """
  found = decoder.DecoderConfig.from_dict(config)
  layers = found.num_hidden_layers
  if max(max(depths), -min(depths) - 1) > layers:
    raise ValueError(
      f"expected a text_encoder with at least {max(depths)} layers, which is where the transformer "
      f"reads it, found num_hidden_layers {layers}"
    )
  if found.hidden_size * len(depths) != width:
    times = f"{len(depths)} times " if len(depths) > 1 else ""
    raise ValueError(
      f"expected the transformer to read {times}hidden_size of text_encoder, found {width} and "
      f"{found.hidden_size}"
    )
  return decoder.DecoderModel(found, tuple(k % (layers + 1) for k in depths))


def own_tensors(
  tensors: Mapping[str, lazy.LazyArray], expected: Collection[str], config: Mapping[str, Any]
) -> dict[str, lazy.LazyArray]:
  """What of a file is the network's, by its own names.

  The language model may have any name in the file ("model.", "model.language_model.", ...), other
  models beside it (a head, one of images), and layers behind the last that is read.
  """
  tables = [name for name in tensors if name == _TABLE or name.endswith(f".{_TABLE}")]
  if len(tables) != 1:
    return dict(tensors)  # which will not fit, and the error lists it
  prefix = tables[0].removesuffix(_TABLE)
  depth = 1 + max((int(match[1]) for match in map(_LAYER.match, expected) if match), default=-1)
  last = decoder.DecoderConfig.from_dict(config).num_hidden_layers
  found = {}
  for name, array in tensors.items():
    own = name.removeprefix(prefix)
    layer = _LAYER.match(own)
    # Layers that the config does not have are kept, and refused: the last one would be another.
    unread = layer and depth <= int(layer[1]) < last
    unread = unread or (own == "norm.weight" and own not in expected)
    if name.startswith(prefix) and not unread and own not in ("lm_head.weight",):
      found[own] = array
  return found
