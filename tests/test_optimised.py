"""The main claims hold in programs as users compile them, with all of XLA's optimisations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = (
    "model/test_parity.py::test_every_layer_equals_transformers[llama]",
    "decoding/test_greedy.py::test_ragged_batch_equals_transformers",
    "decoding/test_drafts.py::test_xla_alone_gives_the_same_tokens",
    "decoding/test_drafts.py::test_noise_in_the_adapter_changes_no_token[quadratic:2]",
    "runs/test_interruption.py::test_a_signal_saves_the_step_and_the_run_resumes[15-143]",
)


@pytest.mark.skipif(bool(os.environ.get("MTP_JAX_OPTIMISED")), reason="all tests run optimised")
def test_parity_losslessness_and_bit_identical_resumption():
    tests = Path(__file__).parent
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # see conftest.py
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {"MTP_JAX_OPTIMISED": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *CLAIMS]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
