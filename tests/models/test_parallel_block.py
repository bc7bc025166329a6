"""The parallel blocks of FLUX.1 and FLUX.2 against diffusers' PyTorch ones, on random weights."""

import jax
import numpy as np
import pytest
import torch_trees

from jaxalign.models.networks import feed_forward, modulation, parallel_block, rope

torch = pytest.importorskip("torch")
flux1 = pytest.importorskip("diffusers.models.transformers.transformer_flux")
flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")

HEADS, HEAD, TEXT, IMAGE = 3, 8, 4, 7
WIDTH, LENGTH = HEADS * HEAD, TEXT + IMAGE
AXES = (2, 2, 4)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def ids():
  return np.random.default_rng(1).integers(0, 20, (LENGTH, len(AXES)))


def torch_turn(ids):
  return flux1.FluxPosEmbed(10000, AXES)(torch.from_numpy(ids))


def run(block, params, *args):
  return jax.jit(block.apply)({"params": params}, *args)


def check(actual, expected):
  expected = expected.detach().numpy()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_block_of_flux1(tokens, ids):
  oracle = torch_trees.randomize(flux1.FluxSingleTransformerBlock(WIDTH, HEADS, HEAD))
  embedding = np.random.default_rng(2).normal(size=(2, WIDTH)).astype(np.float32)
  x, raw = torch.from_numpy(tokens), torch.from_numpy(embedding)
  expected = torch.cat(oracle(x[:, TEXT:], x[:, :TEXT], raw, torch_turn(ids)), dim=1)
  params = torch_trees.to_tree(oracle.state_dict())
  block = parallel_block.ParallelBlock(HEADS)
  check(run(block, params, tokens, embedding, rope.table(ids, AXES, 10000)), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_block_of_flux2(tokens, ids, rows):
  """Of one row, the modulation is that of the whole batch."""
  oracle = torch_trees.randomize(
    flux2.Flux2SingleTransformerBlock(WIDTH, HEADS, HEAD, mlp_ratio=2.6)
  )
  projected = np.random.default_rng(3).normal(size=(rows, 3 * WIDTH)).astype(np.float32)
  whole = torch.from_numpy(projected)[:, None].expand(2, 1, -1)
  expected = oracle(torch.from_numpy(tokens), None, whole, torch_turn(ids))
  params = torch_trees.to_tree(oracle.state_dict())
  block = parallel_block.FusedParallelBlock(HEADS, int(2.6 * WIDTH))
  (modulated,) = modulation.split(projected, 1)
  check(run(block, params, tokens, modulated, rope.table(ids, AXES, 10000)), expected)


def test_gated_by_hand():
  # silu(1) = 1 / (1 + 1/e) = 0.731059, silu(-2) = -2 / (1 + e^2) = -0.238406; times 3 and 5.
  np.testing.assert_allclose(
    feed_forward.gated(np.array([1.0, -2.0, 3.0, 5.0])), [2.193176, -1.192029], atol=1e-5
  )
