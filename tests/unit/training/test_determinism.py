"""Deterministic kernels, asked for and not."""

import subprocess
import sys

# In a process of its own: the setting stays. max_unpool has no deterministic form on any device.
CODE = """
import torch
from training.determinism import apply_determinism
apply_determinism({enable}, {warn_only})
y = torch.nn.functional.max_unpool1d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), 2)
print("computed", torch.backends.cudnn.deterministic)
"""


def run(enable: bool, warn_only: bool) -> subprocess.CompletedProcess:
    code = CODE.format(enable=enable, warn_only=warn_only)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_an_operation_without_deterministic_form_ends_the_run():
    refused = run(True, False)
    assert refused.returncode == 1 and "deterministic" in refused.stderr and "computed" not in refused.stdout


def test_or_warns():
    warned = run(True, True)
    assert warned.stdout == "computed True\n" and "deterministic" in warned.stderr


def test_or_runs_where_nobody_asked():
    assert run(False, False).stdout == "computed False\n"
