"""Samplers that go by a reward."""

from mutations.mutant import BEST_OF_N, Mutant

STEERING = [
  Mutant(
    "a sampler ranks by the queries of other records",
    "system.py",
    "binding.on_device(self.rewards).encode(records))",
    "binding.on_device(self.rewards).encode(records[::-1]))",
    BEST_OF_N,
  ),
  Mutant(
    "the worst of n is kept",
    "steering/best_of_n.py",
    "(new.reward > best.reward)",
    "(new.reward < best.reward)",
    BEST_OF_N,
  ),
  Mutant(
    "the last of equals is kept",
    "steering/best_of_n.py",
    "(new.reward > best.reward)",
    "(new.reward >= best.reward)",
    BEST_OF_N,
  ),
  Mutant(
    "all draws but the first share their noise",
    "steering/best_of_n.py",
    "jax.random.fold_in(key, num_steps + k)",
    "jax.random.fold_in(key, num_steps + 1)",
    BEST_OF_N,
  ),
  Mutant(
    "all draws start from the first one's noise",
    "steering/best_of_n.py",
    "jnp.where(first, x_T, fresh)",
    "x_T",
    BEST_OF_N,
  ),
  Mutant(
    "a bound on a KL forgets that one of n is kept",
    "steering/best_of_n.py",
    "math.log(n) - (n - 1) / n",
    "math.log(n)",
    BEST_OF_N,
  ),
  Mutant(
    "an evaluation samples without its sampler",
    "evaluation/evaluation.py",
    "self.steered(sys).sample_all(",
    "sys.sample_all(",
    ("steering/test_steered_commands.py",),
  ),
  Mutant(
    "the base model of a comparison is sampled by another sampler",
    "evaluation/evaluation.py",
    "base = self.run(sys, sys.policy.params)",
    "base = dataclasses.replace(self, steered=lambda sys: sys).run(sys, sys.policy.params)",
    ("steering/test_steered_commands.py",),
  ),
]
