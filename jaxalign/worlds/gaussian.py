"""A world with closed-form answers: Gaussian mixtures and quadratic rewards.

Score, likelihood, the ideal denoiser at every noise level, and the optimum of KL-regularised
alignment are all known, so a method can be shown to reach the right distribution, not only a better
one. Everything is a pure function of arrays; a mixture is a tree of parameters like any other.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.diffusion import predictions, schedulers
from jaxalign.types import Array, DenoiseFn, Key, Params, Record

SIZES = {"test": 96, "validation": 48, "train": 400}  # records of each set


class Mixture(NamedTuple):
  """A mixture of K Gaussians in D dimensions.

  log_weights: `[K]`; their exponentials sum to 1.
  means:       `[K, D]`.
  covs:        `[K, D, D]`, symmetric and positive definite.
  """

  log_weights: Array
  means: Array
  covs: Array


class QuadraticReward(NamedTuple):
  """r(x) = b x - x A x / 2: concave in the directions where A is positive, linear where it is 0.

  curvature: A, `[D, D]`, symmetric.
  slope:     b, `[D]`.
  """

  curvature: Array
  slope: Array

  def __call__(self, x: Array) -> Array:  # [B, D] -> [B]
    return x @ self.slope - 0.5 * jnp.einsum("bi,ij,bj->b", x, self.curvature, x)


def records(split: str) -> tuple[Record, ...]:
  """The records of "train", "validation" or "test": `{"number": n}`, no n in two sets.

  No sample depends on its record here, but records are what groups and intervals are made of.
  """
  checks.check_choice("gaussian records", split, SIZES)
  names = list(SIZES)
  first = sum(SIZES[name] for name in names[: names.index(split)])
  return tuple({"number": number} for number in range(first, first + SIZES[split]))


def sample(key: Key, mixture: Mixture, num_samples: int) -> Array:  # [num_samples, D]
  """Independent samples."""
  key_component, key_noise = jax.random.split(key)
  k = jax.random.categorical(key_component, mixture.log_weights, shape=(num_samples,))
  noise = jax.random.normal(key_noise, (num_samples, mixture.means.shape[1]))
  roots = jnp.linalg.cholesky(mixture.covs)
  return jnp.asarray(mixture.means)[k] + jnp.einsum("bij,bj->bi", roots[k], noise)


def moments(mixture: Mixture) -> tuple[Array, Array]:  # [D], [D, D]
  """Mean and covariance of the mixture as a whole."""
  weights = jnp.exp(mixture.log_weights)
  mean = weights @ mixture.means
  offsets = mixture.means - mean
  between = jnp.einsum("k,ki,kj->ij", weights, offsets, offsets)
  return mean, jnp.einsum("k,kij->ij", weights, mixture.covs) + between


def log_prob(mixture: Mixture, x: Array) -> Array:  # [B, D] -> [B]
  """Log-density in nats."""
  return jax.nn.logsumexp(_joint_log_prob(mixture, x), axis=1)


def score(mixture: Mixture, x: Array) -> Array:  # [B, D] -> [B, D]
  """The gradient of `log_prob` in x."""
  return jax.grad(lambda x: jnp.sum(log_prob(mixture, x)))(x)


def noised(mixture: Mixture, alpha: Array | float, sigma: Array | float) -> Mixture:
  """The distribution of alpha x_0 + sigma eps for scalars alpha and sigma."""
  identity = jnp.eye(mixture.means.shape[1])
  covs = alpha**2 * mixture.covs + sigma**2 * identity
  return Mixture(mixture.log_weights, alpha * mixture.means, covs)


def posterior_mean(mixture: Mixture, x_t: Array, alpha: Array, sigma: Array) -> Array:  # [B, D]
  """E[x_0 | x_t] for `x_t [B, D]` and `alpha`, `sigma` `[B]`: what an ideal network predicts."""

  def one(x_t, alpha, sigma):
    marginal = noised(mixture, alpha, sigma)
    responsibilities = jax.nn.softmax(_joint_log_prob(marginal, x_t[None])[0])
    pulls = jnp.linalg.solve(marginal.covs, (x_t - marginal.means)[..., None])
    means = mixture.means + alpha * (mixture.covs @ pulls)[..., 0]
    return responsibilities @ means

  return jax.vmap(one)(x_t, alpha, sigma)


def make_denoise_fn(scheduler_config: Mapping[str, Any]) -> DenoiseFn:
  """The ideal denoiser of a diffusers scheduler_config.json; its parameters are those of a
  `Mixture`, as a dict (`mixture._asdict()`).

  It is differentiable in them, and `cond` is not used.
  """
  prediction_type = schedulers.network_prediction_type(scheduler_config)
  flow = schedulers.is_flow(scheduler_config)
  table = schedulers.training_table(scheduler_config)

  def denoise(params: Params, x_t: Array, t: Array, cond: Any) -> Array:
    del cond
    if flow:  # t is 1000 sigma, and a sampler may stop between two levels of the table
      sigma = t / 1000.0
      alpha = 1.0 - sigma
    else:
      row = table[jnp.asarray(t, jnp.int32)]
      alpha, sigma = row.alpha_t, row.sigma_t
    x_0 = posterior_mean(Mixture(**params), x_t, alpha, sigma)
    eps = (x_t - alpha[:, None] * x_0) / sigma[:, None]
    return predictions.target(x_0, eps, alpha, sigma, prediction_type)

  return denoise


def tilt(mixture: Mixture, reward: QuadraticReward, beta: float) -> tuple[Mixture, Array]:
  """The optimum of KL-regularised alignment, and the logarithm of its normaliser Z.

  q(x) = p(x) exp(r(x) / beta) / Z maximises E_q[r] - beta KL(q | p), and the maximum is
  beta log Z (Rafailov et al. 2023, arXiv:2305.18290, appendix A.1). With a quadratic reward q is a
  mixture again: precisions gain A / beta, and weights follow each component's own normaliser.

  Raises ValueError where beta is not positive, or the reward rises faster than some component
  falls, so that no optimum exists.
  """
  if not beta > 0:
    raise ValueError(f"beta: expected a positive temperature, got {beta}")
  precisions = np.linalg.inv(np.asarray(mixture.covs, np.float64))
  means = np.asarray(mixture.means, np.float64)
  new_precisions = precisions + np.asarray(reward.curvature, np.float64) / beta
  smallest = np.linalg.eigvalsh(new_precisions).min()
  if smallest <= 0:
    raise ValueError(
      f"beta: at {beta} the reward rises faster than the density falls (smallest precision of the "
      f"optimum {smallest:.3g}), so exp(r / beta) has no normaliser\nraise beta"
    )
  covs = np.linalg.inv(new_precisions)
  pulls = np.einsum("kij,kj->ki", precisions, means)
  new_pulls = pulls + np.asarray(reward.slope, np.float64) / beta
  new_means = np.einsum("kij,kj->ki", covs, new_pulls)
  log_normalizers = 0.5 * (
    np.einsum("ki,ki->k", new_pulls, new_means)
    - np.einsum("ki,ki->k", pulls, means)
    + np.linalg.slogdet(precisions)[1]
    - np.linalg.slogdet(new_precisions)[1]
  )
  log_weights = np.asarray(mixture.log_weights, np.float64) + log_normalizers
  log_z = np.logaddexp.reduce(log_weights)
  tilted = Mixture(*(jnp.asarray(part) for part in (log_weights - log_z, new_means, covs)))
  return tilted, jnp.asarray(log_z)


def _joint_log_prob(mixture: Mixture, x: Array) -> Array:  # [B, D] -> [B, K]
  offsets = x[:, None] - mixture.means  # [B, K, D]
  roots = jnp.linalg.cholesky(mixture.covs)

  def whiten(root: Array, offset: Array) -> Array:  # [D, D], [B, D]
    return jax.scipy.linalg.solve_triangular(root, offset.T, lower=True).T

  z = jax.vmap(whiten, (0, 1), 1)(roots, offsets)  # [B, K, D]
  half_log_det = jnp.sum(jnp.log(jnp.diagonal(roots, axis1=1, axis2=2)), axis=1)
  constant = 0.5 * x.shape[1] * jnp.log(2.0 * jnp.pi)
  return mixture.log_weights - 0.5 * jnp.sum(jnp.square(z), axis=2) - half_log_det - constant
