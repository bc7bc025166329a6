"""What a dry run says of memory: a line through two sizes, and honest words about its source."""

import jax

from jaxalign.training import dry_run as dry_run_lib

MIB = 2.0**20


def test_the_largest_microbatch_is_where_the_hungriest_program_takes_all_memory():
  needs = {
    "rollout": dry_run_lib.Need(fixed=10 * MIB, each=2 * MIB),
    "update": dry_run_lib.Need(fixed=30 * MIB, each=5 * MIB),
  }
  text = dry_run_lib.describe_memory(needs, 4, 100 * MIB, 1000 * MIB, "its own words")
  # 100 + 30 + 5 m = 1000 at m = 174; the rollout would allow (1000 - 100 - 10) / 2 = 445.
  fits = 174 // jax.device_count() * jax.device_count()
  assert f"largest microbatch: about {fits}, where the update" in text
  assert "rollout 118 MiB, update 150 MiB, 100 MiB of it weights" in text
  assert "of 1000 MiB, its own words" in text


def test_a_program_that_does_not_grow_decides_nothing():
  needs = {"prompts": dry_run_lib.Need(fixed=MIB, each=0.0)}
  assert "not known" in dry_run_lib.describe_memory(needs, 4, MIB, 1000 * MIB, "")
  needs["update"] = dry_run_lib.Need(fixed=2000 * MIB, each=MIB)
  assert "about 0, where the update" in dry_run_lib.describe_memory(needs, 4, MIB, 1000 * MIB, "")


def test_a_cpu_states_no_memory_and_the_line_says_whose_it_is():
  limit, source = dry_run_lib.device_memory()
  assert limit > 2**28
  assert "this machine's, as the device states none" in source
