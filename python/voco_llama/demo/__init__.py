"""A small real VoCo-LLaMA: questions in words about images of handwritten digits."""

from pathlib import Path

# The shipped checkpoint, and the one before it ever saw a VoCo token, for the lower bound.
MODEL = Path(__file__).parent / "model"
UNCOMPRESSED = Path(__file__).parent / "model_uncompressed"
