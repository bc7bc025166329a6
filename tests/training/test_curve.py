"""The curve of a run has a panel for each quantity."""

import numpy as np
import pytest
from PIL import Image

from jaxalign.training import curve


@pytest.mark.parametrize("evaluated, rows, columns", [(0, 1, 1), (1, 1, 2), (3, 2, 3)])
def test_the_curve_has_a_panel_for_each_quantity(evaluated, rows, columns, tmp_path):
  names = ["loss/total", *(f"eval/{number}" for number in range(evaluated))]
  records = [{"step": step, **dict.fromkeys(names, float(step))} for step in range(3)]
  curve.save_curve(records, tmp_path / "curve.png")
  with Image.open(tmp_path / "curve.png") as picture:
    assert picture.size == (round(3.6 * 120) * columns, round(2.4 * 120) * rows)
    assert (np.asarray(picture.convert("L")) < 200).any()
