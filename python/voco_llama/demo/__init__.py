"""A small real VoCo-LLaMA: questions in words about images and clips of handwritten digits."""

from pathlib import Path

# The shipped checkpoint, and the one before it ever saw a VoCo token, for the lower bound.
MODEL = Path(__file__).parent / "model"
UNCOMPRESSED = Path(__file__).parent / "model_uncompressed"
# The shipped checkpoint trained further for clips; it pays for them with some of its accuracy on images.
CLIPS = Path(__file__).parent / "model_clips"
