"""Multi-token prediction for pretrained language models, in JAX (arXiv 2507.11851)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mtp_jax")
except PackageNotFoundError:  # used from a checkout that was never installed
    __version__ = "unknown"
