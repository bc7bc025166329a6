"""Who sends what to whom: groups of devices as XLA writes them, mesh axes, bytes."""

import pytest

from jaxalign.aot import collectives, hlo


class Device:
  def __init__(self, number):
    self.id, self.process_index = number, number // 8


class Mesh:
  """What is asked of a mesh, of devices that need not exist."""

  axis_names = ("data", "fsdp")

  def __init__(self, data, fsdp):
    import numpy as np

    self.shape = {"data": data, "fsdp": fsdp}
    self.devices = np.array([Device(n) for n in range(data * fsdp)]).reshape(data, fsdp)
    self.size = data * fsdp


def find(line, mesh):
  text = f"ENTRY %main () -> f32[1] {{\n  %a = f32[1024] parameter(0)\n  {line}\n}}\n"
  program = hlo.Program(text)
  return collectives.find(program, program.runs, mesh)


@pytest.mark.parametrize("groups, axes, size", [
  ("{{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
  ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
  ("{{0,1,2,3,4,5,6,7}}", "data x fsdp", 8),
  ("{}", "data x fsdp", 8),
  ("[2,4]<=[8]", "fsdp", 4),
  ("[4,2]<=[2,4]T(1,0)", "data", 2),
  ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "fsdp", 4),
  ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data", 2),
  ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", "data x fsdp", 8),
  ("mesh['axis_0'=8] {'axis_0':(1)2}", "data", 2),
  ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", "fsdp", 4),
])  # fmt: skip
def test_groups_are_read_in_every_form(groups, axes, size):
  line = f"%b = f32[1024] all-reduce(%a), replica_groups={groups}, to_apply=%add"
  (found,) = find(line, Mesh(2, 4))
  assert (found.axes, found.size, found.num_bytes) == (axes, size, 4096)


def test_a_form_that_is_not_known_is_an_error():
  with pytest.raises(ValueError, match="expected replica groups"):
    find("%b = f32[1024] all-reduce(%a), replica_groups=new<8>", Mesh(2, 4))


def test_bytes_are_those_of_the_whole():
  mesh = Mesh(2, 4)
  gather = "%b = f32[4096] all-gather(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
  scatter = "%b = f32[256] reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
  assert find(gather, mesh)[0].num_bytes == 4 * 4096
  assert find(scatter, mesh)[0].num_bytes == 4096


def test_of_arrays_that_are_sent_as_one_the_largest_is_known():
  text = """\
ENTRY %main (a: f32[1024], b: bf16[64]) -> f32[1] {
  %a = f32[1024] parameter(0)
  %b = bf16[64] parameter(1)
  %both = (f32[1024], bf16[64]) all-reduce(%a, %b), replica_groups={}, to_apply=%add
}
"""
  program = hlo.Program(text)
  (found,) = collectives.find(program, program.runs, Mesh(2, 4))
  assert (found.num_bytes, found.largest, found.dtypes) == (4096 + 128, 4096, ("bf16", "f32"))


def test_an_asynchronous_one_counts_once():
  text = """\
%wrapped (p: f32[1024]) -> f32[256] {
  %p = f32[1024] parameter(0)
  ROOT %scatter = f32[256] reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: f32[1024]) -> f32[256] {
  %a = f32[1024] parameter(0)
  %start = ((f32[1024]), f32[256]) async-start(%a), calls=%wrapped
  %reduced = f32[1024] all-reduce-start(%a), replica_groups={}
  %reduced-done = f32[1024] all-reduce-done(%reduced)
  ROOT %done = f32[256] async-done(%start)
}
"""
  program = hlo.Program(text)
  found = collectives.find(program, program.runs, Mesh(2, 4))
  assert [(one.kind, one.axes) for one in found] == [
    ("reduce-scatter", "fsdp"),
    ("all-reduce", "data x fsdp"),
  ]


def test_seconds_depend_on_the_way_and_on_the_hosts():
  link = (400.0, 200.0)
  (within,) = find("%b = f32[1024] all-reduce(%a), replica_groups={}", Mesh(2, 4))
  (across,) = find("%b = f32[1024] all-reduce(%a), replica_groups={}", Mesh(2, 8))
  assert within.seconds(link) == pytest.approx(2 * 7 / 8 * 4096 / 400)
  assert across.seconds(link) == pytest.approx(2 * 15 / 16 * 4096 / 200)
  permuted = "%b = f32[1024] collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
  (sent,) = find(permuted, Mesh(2, 4))
  assert sent.axes == "fsdp" and sent.seconds(link) == pytest.approx(4096 / 400)


