"""LoRA training for Stable Diffusion and everything around it."""

__version__ = "0.1.0"
