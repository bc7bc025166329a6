"""The optimizer, from plain arguments."""

import optax

from jaxalign import checks


def make(
  *,
  learning_rate: float,
  max_grad_norm: float,
  weight_decay: float,
  b1: float,
  b2: float,
  epsilon: float,
  warmup_steps: int = 0,
  decay_steps: int = 0,
) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101) behind global-norm clipping.

  Args:
    learning_rate: peak value, in optimizer steps after the warm-up.
    max_grad_norm: gradients of a larger global norm are scaled down to it.
    weight_decay: decoupled, multiplied by the learning rate.
    b1, b2, epsilon: Adam's.
    warmup_steps: optimizer steps of linear warm-up from 0.
    decay_steps: optimizer steps, the warm-up included, after which a cosine decay reaches 0;
      0 keeps the rate constant.
  """
  least = {"learning_rate": learning_rate, "weight_decay": weight_decay, "epsilon": epsilon}
  least |= {"warmup_steps": warmup_steps, "decay_steps": decay_steps}
  for name, value in least.items():
    checks.check_range(f"config.optim.{name}", value, 0)
  for name, value in (("b1", b1), ("b2", b2)):
    checks.check_range(f"config.optim.{name}", value, 0, 1)
  if not max_grad_norm > 0:
    raise ValueError(f"config.optim.max_grad_norm: expected more than 0, got {max_grad_norm}")
  if 0 < decay_steps <= warmup_steps:
    raise ValueError(
      f"config.optim.decay_steps: expected 0, or a count above {warmup_steps} (warmup_steps); got "
      f"{decay_steps}"
    )
  if decay_steps:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, decay_steps)
  elif warmup_steps:
    schedule = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  else:
    schedule = learning_rate
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(schedule, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay),
  )
