"""tokenmesh: an LLM serving mesh on stock vLLM."""

__version__ = "0.1.0"
