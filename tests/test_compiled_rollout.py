"""What the compiled rollout does once, before its loop, and what it does in every step."""

import re

import pytest

from jaxalign import streams, system


@pytest.fixture(scope="module")
def compiled(small_model):
  sys = system.make_system(
    seed=0,
    model={"path": str(small_model)},
    lora={"rank": 2, "alpha": 2.0, "targets": r"(to_q|to_k|to_v|to_out_0)$"},
    process={"transition": "ddim", "num_steps": 3, "eta": 1.0},
    guidance={"scale": 5.0},
  )
  ids = sys.model.tokenize([{"prompt": "a red circle"}] * 2)
  noise = (0, streams.number("rollout"), 0, 0, None)
  args = (sys.policy.params, sys.frozen, ids, *noise, sys.pipeline.table)
  return sys.sample_fn.lower(*args).compile().as_text()


def products(text):
  """`{layer: (times inside loops, times outside)}` of every matrix product, by flax's path."""
  computations, name = {}, ""
  for line in text.splitlines():
    header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    if header:
      name = header[1]
      computations[name] = []
    elif name:
      computations[name].append(line)
  inside, todo = set(), [body for body in re.findall(r"body=%?([\w.\-]+)", text)]
  while todo:
    name = todo.pop()
    if name not in inside:
      inside.add(name)
      called = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
      todo += [found for line in computations[name] for found in re.findall(called, line)]
  counts = {}
  for name, lines in computations.items():
    for line in lines:
      path = re.search(r' dot\(.*op_name="[^"]*?/(\w+blocks?_?\d*/[^"]*)/dot_general"', line)
      if path:
        within, outside = counts.get(path[1], (0, 0))
        hit = name in inside
        counts[path[1]] = (within + hit, outside + (not hit))
  return counts


def test_keys_and_values_of_the_text_are_projected_once(compiled):
  """Their adapters' parts too: XLA moves what does not change out of the loop."""
  found = products(compiled)
  of_text = {path: n for path, n in found.items() if re.search(r"attn2/to_[kv]$", path)}
  assert len(of_text) == 4, sorted(found)  # two transformers of the small network, keys and values
  # The frozen product and the two of the adapter, each once.
  assert set(of_text.values()) == {(0, 3)}


def test_what_changes_with_the_step_stays_in_the_loop(compiled):
  found = products(compiled)
  of_latents = {path: n for path, n in found.items() if re.search(r"attn1/to_[kv]$", path)}
  assert len(of_latents) == 4 and set(of_latents.values()) == {(3, 0)}
