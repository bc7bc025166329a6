"""Best of n on eight virtual devices chooses what it chooses on one."""

from device_jobs import printed_by


def test_eight_devices_choose_as_one_does(compilation_cache):
  found = printed_by("steering_devices", compilation_cache)
  assert found.pop("moved") > 0.1  # some draws beyond the first are chosen
  assert len(found) == 2
  for differences in found.values():
    assert differences["plans"] < 1e-4 and differences["rewards"] < 1e-4
    assert differences["rows"] == [2]  # of 16, each device has its own
