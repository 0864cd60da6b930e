"""The host half of the reports of bad values: one fault is raised once, with its own number, and waits only then."""

from __future__ import annotations

import emulation
import torch
from conftest import requires

pytestmark = requires("compiler")
EXPECTED = """\
nothing after  on 0
0 calls
nothing after  on 2
nothing after 13 on 2
op: expected a in [0, 4), got 7 after 13 on 2
nothing after 13 on 2
op: expected b in [0, 5), got -1 after 13 on 2
nothing after  on 2
"""


def test_one_fault_is_raised_once() -> None:
    binary = emulation.build("device_error_main.cpp", include="host_stubs")
    log = emulation.run(binary, {}, {"log": ((len(EXPECTED),), torch.uint8)})["log"]
    assert bytes(log.tolist()).decode() == EXPECTED
