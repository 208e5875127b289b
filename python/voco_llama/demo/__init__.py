"""A small real VoCo-LLaMA: questions in words about images of handwritten digits."""
