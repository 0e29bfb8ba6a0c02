"""Where measured data and reference values lie, and why a test that needs them is skipped."""
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BATT_NB_SHARED", ROOT.parent/"shared"))
DATA, ORACLES = SHARED/"data", SHARED/"oracles"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the measured data sets are not beside this checkout (set BATT_NB_SHARED to their folder)")


def oracle(name):
    """The reference values of one technique."""
    return json.loads((ORACLES/f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_thread():
    """Two threads of torch on busy cores wait for each other."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
