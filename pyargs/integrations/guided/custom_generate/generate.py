"""`generate(custom_generate=FOLDER)` of transformers runs `generate` of this file, which is pyargs' own."""

from pyargs.integrations.transformers import generate

__all__ = ["generate"]
