"""Multi-token prediction for pretrained language models, in JAX (arXiv 2507.11851)."""

from importlib.metadata import version

__version__ = version("mtp_jax")
