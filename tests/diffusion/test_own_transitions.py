"""Reverse steps bound to a table of one's own, and those from outside the package."""

import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_configs import SD1
from transition_cases import FLOW, KNOBS, draw

from jaxalign.diffusion import schedules, transitions
from jaxalign.types import expand_to


@pytest.mark.parametrize("name", transitions.TRANSITIONS)
def test_a_table_of_ones_own_is_bound_as_that_of_a_config(name):
  config = dict(_class_name=FLOW)
  expected = transitions.make_process(config, num_steps=6, transition=name, **KNOBS[name])
  bound = transitions.bind(expected.table, name, "velocity", **KNOBS[name])
  x_t, velocity, _ = draw()
  for found, wanted in zip(
    bound.transition(x_t, velocity, bound.table[2]),
    expected.transition(x_t, velocity, expected.table[2]),
    strict=True,
  ):
    np.testing.assert_array_equal(found, wanted)


def test_bind_explains_what_is_wrong():
  flow, other = schedules.uniform_flow_table(4), schedules.log_snr_table(4)
  with pytest.raises(ValueError, match=r"'dance_sde': expected the schedule of a rectified flow"):
    transitions.bind(other, "dance_sde", "x_0", eta=0.3)
  with pytest.raises(ValueError, match="expected noise_level; got none"):
    transitions.bind(flow, "cps", "velocity")
  with pytest.raises(ValueError, match="zero SNR"):
    transitions.bind(flow, "ddim", "eps", eta=0.0)


def half_noise(x_t, prediction, row, *, prediction_type, share, fault=""):
  """CPS from outside the package, and with a `fault` one of the mistakes that are looked for."""
  mean, std = transitions.cps(
    x_t, prediction, row, prediction_type=prediction_type, noise_level=share
  )
  if fault == "not a pair":
    return mean
  if fault == "not expanded":
    return mean, row.sigma_s * np.sin(share * row.noise_scale * np.pi / 2)
  if fault == "a number for all":
    return mean, 0.0
  if fault == "negative":
    return mean, -std
  if fault == "not a number":
    return mean, std * np.nan
  if fault == "learned":
    return mean, std * jnp.exp(prediction)
  if fault == "deaf":
    return mean, share * expand_to(row.sigma_s, x_t)
  return mean, std


OWN = f"{__name__}:half_noise"


@pytest.mark.parametrize("scheduler", [dict(_class_name=FLOW), SD1])
def test_a_transition_from_outside_is_named_by_its_function(scheduler):
  """With the prediction type of the model, and the knobs of the config."""
  own = transitions.make_process(scheduler, num_steps=6, transition=OWN, share=0.8)
  cps = transitions.make_process(scheduler, num_steps=6, transition="cps", noise_level=0.8)
  x_t, prediction, _ = draw((6, 5, 3, 2))
  for found, wanted in zip(
    own.transition(x_t, prediction, own.table),
    cps.transition(x_t, prediction, cps.table),
    strict=True,
  ):
    np.testing.assert_array_equal(found, wanted)
  assert own.noisy_steps() == cps.noisy_steps()
  assert transitions.bind(cps.table[:1], OWN, "velocity", share=0.8).noisy_steps() == [0]


@pytest.mark.parametrize(
  "name, knobs, message",
  [
    (OWN, dict(share=0.5, fault="not a pair"), r"to return \(mean, std\), got ArrayImpl"),
    (OWN, dict(share=0.5, fault="not expanded"), r"std \(4, 1\) of x_t .* \(4,\)\n.*expand_to"),
    (OWN, dict(share=0.5, fault="a number for all"), r"got \(4, 1\) and \(\)"),
    (OWN, dict(share=0.5, fault="negative"), r"finite std of at least 0, got \[-"),
    (OWN, dict(share=0.5, fault="not a number"), r"finite std of at least 0, got \[nan"),
    (OWN, dict(share=0.5, fault="learned"), "a std that depends on the row alone"),
    (OWN, dict(share=0.5, fault="deaf"), r"std 0 where row\.noise_scale is 0, got more\nmultiply"),
    (OWN, dict(shar=0.5), r"half_noise': missing a required .*'share'.*did you mean \"share\""),
    (f"{__name__}:half_nois", {}, r'transition ".*": module .* did you mean "half_noise"'),
    ("nowhere.to_be:found", {}, "could not import"),
    ("flow_sd", {}, r'or your own function as .*; got \'flow_sd\'; did you mean "flow_sde"'),
  ],
)
def test_what_is_wrong_with_a_transition_from_outside(name, knobs, message):
  with pytest.raises(ValueError, match=message) as error:
    transitions.bind(schedules.uniform_flow_table(4), name, "velocity", **knobs)
  assert len(str(error.value).splitlines()) <= 3
