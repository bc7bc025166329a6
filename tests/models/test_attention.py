"""Every implementation of attention against the plain one: values, gradients, what it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.distributed import placement
from jaxalign.models.networks import attention, layers

FORMS = [attention.on_cpu, attention.in_pieces]
SHAPES = [  # B, T, N, H, D
  (3, 257, 77, 2, 7),
  (2, 130, 129, 1, 16),
]


@pytest.fixture(params=["one piece", "some heads", "some rows"])
def pieces(request, monkeypatch):
  if request.param == "some heads":  # of 19789 and 16770 logits: 3 of 6 heads at once, and 2 of 2
    monkeypatch.setattr(attention, "LOGITS_IN_CACHE", 70000)
  if request.param == "some rows":
    monkeypatch.setattr(attention, "LOGITS_IN_CACHE", 5000)
    monkeypatch.setattr(attention, "MAX_LOGITS", 20000)


@pytest.fixture(params=["few keys", "many keys"])
def keys(request, monkeypatch):
  if request.param == "many keys":
    monkeypatch.setattr(attention, "MANY_KEYS", 2)


def draw(B, T, N, H, D, dtype=jnp.float32):
  """By numpy: JAX compiles a program for each shape that it draws."""
  rng = np.random.default_rng(T)
  shapes = [(B, T, H, D), (B, N, H, D), (B, N, H, D), (B, T, H, D)]
  return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def draw_mask(kind, T, N):
  """None, of queries and keys, or of each example's keys alone, as padding is."""
  rng = np.random.default_rng(1)
  shapes = {"none": None, "both": (1, 1, T, N), "keys": (2, 1, 1, N)}
  if shapes[kind] is None:
    return None
  mask = rng.random(shapes[kind]) < 0.5
  mask[..., N // 2] = True
  return mask


def value_and_grads(function, query, key, value, weight):
  def loss(*inputs):
    out = function(*inputs)
    return jnp.sum(jnp.sin(out) * weight), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
  return out, grads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FORMS)
def test_values_and_gradients_are_those_of_the_plain_form(function, shape, pieces, keys):
  inputs = draw(*shape)
  out, grads = value_and_grads(function, *inputs)
  expected, expected_grads = value_and_grads(attention.plain, *inputs)
  np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
  for ours, theirs in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", ["none", "both", "keys"])
@pytest.mark.parametrize("T, N", [(5, 3), (150, 151)])
def test_the_chosen_form_is_softmax_attention(T, N, masked, pieces):
  query, key, value, _ = draw(2, T, N, 2, 8)
  mask = draw_mask(masked, T, N)
  logits = np.einsum("bthd,bnhd->bhtn", query, key) / np.sqrt(8.0)
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  expected = np.einsum("bhtn,bnhd->bthd", weights, value).reshape(2, T, 16)
  actual = jax.jit(layers.attention)(query, key, value, mask)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow(keys):
  query, key, value, _ = draw(1, 140, 140, 1, 8)
  out = attention.on_cpu(100.0 * query, 100.0 * key, value)
  np.testing.assert_allclose(out, attention.plain(100.0 * query, 100.0 * key, value), rtol=1e-5)


@pytest.mark.parametrize("function", FORMS)
def test_half_precision_goes_in_and_out_and_softmax_is_float32(function):
  inputs = draw(2, 140, 130, 2, 8, jnp.bfloat16)
  exact = attention.plain(*(x.astype(jnp.float32) for x in inputs[:3]))
  out = function(*inputs[:3])
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_a_cpu_never_holds_the_logits_of_all_heads():
  *inputs, weight = draw(8, 512, 512, 8, 8)
  logits = 8 * 8 * 512 * 512 * 4  # bytes

  def temporary(function):
    grads = jax.jit(functools.partial(value_and_grads, function))
    return grads.lower(*inputs, weight).compile().memory_analysis().temp_size_in_bytes

  # Fusions of JAX 0.12 keep a third more than those of 0.10.
  assert temporary(attention.plain) > logits > 1.5 * temporary(attention.on_cpu)


@pytest.mark.parametrize("masked", ["none", "both", "keys"])
@pytest.mark.parametrize("T, N", [(6, 4), (6, 7), (5, 4), (5, 7)])
def test_odd_lengths_and_masks_of_keys_are_lengths_for_cudnn(T, N, masked, monkeypatch):
  """By XLA's form in place of cuDNN's, which takes the same arguments."""
  asked = []

  def stand_in(query, key, value, *, implementation, **options):
    asked.append((implementation, query.shape[1] % 2, key.shape[1] % 2))
    return original(query, key, value, implementation="xla", **options)

  original = jax.nn.dot_product_attention
  query, key, value, weight = draw(2, T, N, 2, 8)
  mask = draw_mask(masked, T, N)
  plain = functools.partial(attention.plain, mask=mask)
  expected, expected_grads = value_and_grads(plain, query, key, value, weight)
  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  cudnn = functools.partial(attention.cudnn, mask=mask)
  out, grads = value_and_grads(cudnn, query, key, value, weight)
  assert asked and set(asked) == {("cudnn", 0, 0)}
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  for ours, theirs in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, size, taken", [
  # On a CPU, and on GPUs of compute capability 7.5, 8.0, 9.0 and 10.0.
  (jnp.bfloat16, 40, (False, False, True, True, True)),
  (jnp.bfloat16, 80, (False, False, True, True, True)),
  (jnp.float16, 64, (False, False, True, True, True)),
  (jnp.bfloat16, 160, (False, False, False, True, False)),
  (jnp.bfloat16, 256, (False, False, False, True, False)),
  (jnp.bfloat16, 512, (False,) * 5),
  (jnp.bfloat16, 12, (False,) * 5),
  (jnp.float32, 64, (False,) * 5),
])
def test_what_is_left_to_cudnn(dtype, size, taken, monkeypatch):
  query = jnp.zeros((1, 2, 1, size), dtype)
  for capability, expected in zip([(0, 0), (7, 5), (8, 0), (9, 0), (10, 0)], taken, strict=True):
    monkeypatch.setattr(placement, "compute_capability", lambda found=capability: found)
    assert attention.cudnn_takes(query) == expected
