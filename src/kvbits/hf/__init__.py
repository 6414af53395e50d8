"""Bridge to Hugging Face transformers: a quantized cache for ``model.generate``."""

from kvbits.hf.cache import QuantizedCache

__all__ = ["QuantizedCache"]
