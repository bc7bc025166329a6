"""What rewards become: advantages, pairs and weights."""

from mutations.mutant import ABSTENTION, ONLINE, ONLINE_LABELS, Mutant

LABELS = [
  Mutant(
    "the worst of a group is preferred",
    "labels/pairs.py",
    "[jnp.argmax(high, axis=1), jnp.argmin(low, axis=1)]",
    "[jnp.argmin(low, axis=1), jnp.argmax(high, axis=1)]",
    ONLINE_LABELS,
  ),
  Mutant(
    "a tie counts as a preference",
    "labels/pairs.py",
    "untied = gap > 0",
    "untied = gap >= 0",
    ONLINE_LABELS,
  ),
  Mutant(
    "a sample is compared with its whole group",
    "labels/advantages.py",
    "deviation * size / jnp.maximum(size - 1.0, 1.0)",
    "deviation",
    ONLINE,
  ),
  Mutant(
    "advantages are clipped from below alone",
    "labels/advantages.py",
    "jnp.clip(advantages, -limit, limit)",
    "jnp.maximum(advantages, -limit)",
    ("labels/test_advantages.py",),
  ),
  Mutant(
    "a record's statistics are those of the row before it",
    "labels/advantages.py",
    "row = jnp.where(is_kept, record_ids, num_records)",
    "row = jnp.where(is_kept, record_ids - 1, num_records)",
    ONLINE,
  ),
  Mutant(
    "an estimator from outside trains what has no verdict",
    "labels/advantages.py",
    "_known(jnp.ravel(jnp.asarray(scores.valid)), clipped)",
    "clipped",
    ABSTENTION,
  ),
  Mutant(
    "what has no verdict counts in the size of its group",
    "labels/advantages.py",
    "jax.ops.segment_sum(valid.astype(shifted.dtype), group, num_groups)",
    "jax.ops.segment_sum(jnp.ones_like(shifted), group, num_groups)",
    ABSTENTION,
  ),
  Mutant(
    "what has no verdict counts in the deviation of the batch",
    "labels/advantages.py",
    "jnp.std(shifted, where=valid)",
    "jnp.std(jnp.where(valid, shifted, 0.0))",
    ABSTENTION,
  ),
  Mutant(
    "a history remembers what has no verdict",
    "labels/advantages.py",
    "num_earlier <= buffer_size) & valid",
    "num_earlier <= buffer_size)",
    ABSTENTION,
  ),
  Mutant(
    "a history counts what has no verdict",
    "labels/advantages.py",
    "valid.astype(stats.count.dtype), mode",
    "1, mode",
    ABSTENTION,
  ),
  Mutant(
    "the one that has a verdict is preferred to one that has none",
    "labels/pairs.py",
    "jnp.where(valid, total, jnp.inf)",
    "jnp.where(valid, total, -9.0)",
    ABSTENTION,
  ),
  Mutant(
    "weights are of mean one over all samples",
    "labels/weights.py",
    "share * jnp.sum(valid)",
    "share * valid.size",
    ABSTENTION,
  ),
  Mutant(
    "the best share is one of all samples",
    "labels/weights.py",
    "jnp.where(valid, rewards, jnp.nan)",
    "jnp.where(valid, rewards, 0.0)",
    ABSTENTION,
  ),
]
