"""Samples, evaluations of them, and the commands that take a finished run."""

from mutations.mutant import AVERAGE, EVALUATION, SYSTEM, Mutant

SAMPLING = [
  Mutant(
    "samples do not start from the noise that they share",
    "system.py",
    "x_T = x_T if start is None else x_T[start]",
    "x_T = x_T",
    SYSTEM,
  ),
  Mutant(
    "guidance is away from the condition itself",
    "system.py",
    "model.condition(frozen, model.empty)",
    "model.condition(frozen, tokens)",
    SYSTEM,
  ),
  Mutant(
    "the KL is the policy's to itself",
    "system.py",
    'policy.variables(params, frozen["base"]),\n      frozen["reference"],',
    'policy.variables(params, frozen["base"]),\n      policy.variables(params, frozen["base"]),',
    SYSTEM,
  ),
  Mutant(
    "the KL is the mean over steps",
    "system.py",
    "return jnp.sum(kl, axis=0)",
    "return jnp.mean(kl, axis=0)",
    SYSTEM,
  ),
  Mutant(
    "all microbatches of an evaluation have the same noise",
    "system.py",
    'streams.number("evaluation"), part, j, None, self.pipeline.table)',
    'streams.number("evaluation"), part, 0, None, self.pipeline.table)',
    SYSTEM,
  ),
  Mutant(
    "all parts of an evaluation have the same noise",
    "evaluation/evaluation.py",
    '"part": PARTS.index(self.part)}',
    '"part": 0}',
    ("evaluation/test_evaluation_parts.py",),
  ),
  Mutant(
    "the base model of a comparison is the aligned one",
    "evaluation/evaluation.py",
    "base = self.run(sys, sys.policy.params)",
    "base = self.run(sys, params)",
    EVALUATION,
  ),
  Mutant(
    "the gain is the loss",
    "evaluation/statistics.py",
    "np.asarray(aligned, np.float64) - np.asarray(base, np.float64)",
    "np.asarray(base, np.float64) - np.asarray(aligned, np.float64)",
    EVALUATION,
  ),
  Mutant(
    "the interval takes samples of one record for independent",
    "evaluation/statistics.py",
    "_, inverse = np.unique(clusters, return_inverse=True)\n  totals",
    "inverse = np.arange(len(clusters))\n  totals",
    ("evaluation/test_statistics.py",),
  ),
  Mutant(
    "evaluate judges the base model",
    "evaluate.py",
    "found.system, found.params, kl_floor",
    "found.system, found.system.policy.params, kl_floor",
    AVERAGE,
  ),
  Mutant(
    "export writes the base model",
    "export.py",
    "policy.variables(found.params, policy.base)",
    "policy.variables(policy.params, policy.base)",
    AVERAGE,
  ),
  Mutant(
    "sample draws with the base model",
    "sample.py",
    "sys, params = found.system, found.params",
    "sys, params = found.system, found.system.policy.params",
    AVERAGE,
  ),
]
