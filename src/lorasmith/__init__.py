"""LoRA training for Stable Diffusion and everything around it."""
