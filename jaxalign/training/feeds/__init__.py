"""Feeds: what turns a method's data, as a value, into the batches of an iteration."""

import os
import pathlib

from jaxalign.methods import Records, Rollouts, Stored
from jaxalign.training.feeds import online, records, stored
from jaxalign.training.feeds.base import Drawn, Feed, Program, SelectFn
from jaxalign.training.setup import Setup

__all__ = ["Drawn", "Feed", "Program", "SelectFn", "make", "select_fn"]


def make(setup: Setup, workdir: str | os.PathLike) -> Feed:
  """The feed of a run, from the sections of its config that concern it."""
  workdir = pathlib.Path(workdir)
  data = setup.method.data
  if isinstance(data, Rollouts):
    return online.Online(setup, data, workdir)
  if isinstance(data, Stored):
    return stored.StoredExamples(setup, data, workdir)
  return records.RecordBatches(setup)


def select_fn(data: Rollouts | Stored | Records) -> SelectFn:
  """`Feed.select` of a method's data, without a feed."""
  if isinstance(data, Rollouts):
    return online.select_fn(data)
  return stored.select if isinstance(data, Stored) else records.select
