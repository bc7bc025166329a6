"""Arrays in files: what comes back, and what is refused with the name of its file."""

import io
import pickle

import numpy as np
import pytest

from jaxalign.modalities import arrays
from jaxalign.modalities.points import POINTS
from jaxalign.modalities.trajectory import PLANS

PLAN = np.linspace(-1.0, 1.0, 32, dtype=np.float32).reshape(16, 2)


def npy(array, **options):
  buffer = io.BytesIO()
  np.save(buffer, array, **options)
  return buffer.getvalue()


def test_what_is_written_is_read_to_the_bit(tmp_path):
  for modality, samples in ((PLANS, np.stack([PLAN, -PLAN])), (POINTS, PLAN[:3])):
    paths = modality.write(samples, tmp_path)
    found = [(modality.read(path), modality.read(path.read_bytes())) for path in paths]
    np.testing.assert_array_equal(found, np.stack([samples, samples], axis=1))
    assert all(one.dtype == np.float32 for pair in found for one in pair)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, ">f4"])
def test_numbers_of_another_width_become_float32(dtype):
  found = PLANS.read(npy(np.eye(2).astype(dtype)))
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, np.eye(2))


class Told:
  """Whose pickle would run code that says so."""

  def __reduce__(self):
    return pytest.fail, ("a pickle was loaded",)


BROKEN = [
  (b"", "EOF"),
  (b"no array", "magic string"),
  (npy(PLAN)[:-1], ""),
  (npy(PLAN)[:40], ""),
  (npy(np.array([Told()], object), allow_pickle=True), "allow_pickle=False"),
  (pickle.dumps(PLAN), "magic string"),
  (npy(PLAN > 0), "real numbers, got bool"),
  (npy(PLAN.astype(complex)), "real numbers, got complex"),
  (npy(PLAN.astype(str)), "real numbers, got <U"),
  (npy(np.where(PLAN > 0.9, np.nan, PLAN)), "finite plans"),
  (npy(np.full((2, 2), 1e300)), "finite plans"),  # more than float32 holds
  (npy(PLAN[None]), r"plans [N, H, 2], H at least 2, got shape (1, 1, 16, 2)"),
  (npy(PLAN[:1]), r"plans [N, H, 2]"),
  (npy(PLAN.T), r"plans [N, H, 2]"),
]


@pytest.mark.parametrize("content, fault", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_by_name(content, fault, tmp_path):
  path = tmp_path / "plan.npy"
  path.write_bytes(content)
  for source, name in ((path, str(path)), (content, "the bytes given")):
    with pytest.raises(ValueError) as caught:
      PLANS.read(source)
    message = str(caught.value)
    assert message.startswith("unreadable array: expected a whole .npy array in ")
    assert name in message and fault in message and len(message.splitlines()) <= 3


def test_a_missing_file_is_refused_by_name(tmp_path):
  with pytest.raises(ValueError, match=r"unreadable array: .*nowhere\.npy"):
    POINTS.read(tmp_path / "nowhere.npy")


def test_whatever_is_broken_in_a_header_is_one_kind_of_error():
  rng = np.random.default_rng(0)
  whole = np.frombuffer(npy(PLAN), np.uint8)
  for _ in range(300):
    data = whole.copy()
    data[rng.integers(128, size=3)] = rng.integers(0, 256, 3)
    try:
      assert arrays.read(data.tobytes(), check=PLANS.check).ndim == 2
    except ValueError as error:
      assert "unreadable array" in str(error)
