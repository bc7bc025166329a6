"""Bugs in flow transformers, their texts and their folders."""

from mutations.mutant import Mutant

TRANSFORMER, FAMILY = "models/test_sd3_transformer.py", "models/test_sd3_family.py"
NETWORKS = "models/networks"

FLOWS = [
  Mutant(
    "shift in the place of scale in front of the output",
    f"{NETWORKS}/modulation.py",
    "    scale, shift = jnp.split(linear(",
    "    shift, scale = jnp.split(linear(",
    (TRANSFORMER,),
  ),
  Mutant(
    "a gate in the place of a scale",
    f"{NETWORKS}/modulation.py",
    "  shift: Array\n  scale: Array\n  gate: Array",
    "  shift: Array\n  gate: Array\n  scale: Array",
    (TRANSFORMER,),
  ),
  Mutant(
    "the image's share of the softmax taken for the text's",
    f"{NETWORKS}/joint_attention.py",
    "text_out, x_out = parts if self.text_first else parts[::-1]",
    "text_out, x_out = parts",
    (TRANSFORMER,),
  ),
  Mutant(
    "queries of the text without their norm",
    f"{NETWORKS}/joint_attention.py",
    "    if self.normalize:\n",
    "    if self.normalize and 'add_q_proj' not in names:\n",
    (TRANSFORMER,),
  ),
  Mutant(
    "the second attention reads what the first one made",
    f"{NETWORKS}/sd3_transformer.py",
    "alone.add(joined, attend(alone.of(x)))",
    "alone.add(joined, attend(alone.of(joined)))",
    (TRANSFORMER,),
  ),
  Mutant(
    "positions from the corner, not the middle",
    f"{NETWORKS}/sd3_transformer.py",
    "top, left = (most - rows) // 2, (most - columns) // 2",
    "top, left = 0, 0",
    (TRANSFORMER,),
  ),
  Mutant(
    "channels of a patch in the order of FLUX",
    f"{NETWORKS}/sd3_transformer.py",
    'packing.unpack(x, "dy_dx_c", config.patch_size)',
    'packing.unpack(x, "c_dy_dx", config.patch_size)',
    (TRANSFORMER,),
  ),
  Mutant(
    "positions that are trained",
    "models/adapters/policy.py",
    " and path[-1] not in layers.CONSTANTS",
    "",
    (FAMILY,),
  ),
  Mutant(
    "the last hidden states of CLIP",
    f"{NETWORKS}/sd3_conditioning.py",
    "[first.penultimate, second.penultimate]",
    "[first.hidden, second.hidden]",
    (FAMILY,),
  ),
  Mutant(
    "one tokenizer for both CLIPs",
    "models/families/sd3.py",
    'zip(("tokenizer", "tokenizer_2"), clips, strict=True)',
    'zip(("tokenizer", "tokenizer"), clips, strict=True)',
    (FAMILY,),
  ),
  Mutant(
    "latents without their shift",
    "models/families/autoencoding.py",
    "    return (z - self._shift) * self.vae.config.scaling_factor",
    "    return z * self.vae.config.scaling_factor",
    ("models/test_stable_diffusion.py",),
  ),
  Mutant(
    "a negative prompt that is ignored",
    "system.py",
    "model = self.model._replace(empty=self.model.tokenize([record]))",
    "model = self.model",
    ("test_sample.py",),
  ),
]
