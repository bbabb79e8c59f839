"""Processes that find this module on their path have no torch, which transformers would import for seconds."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
