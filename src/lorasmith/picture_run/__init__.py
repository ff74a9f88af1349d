"""What commands that draw pictures share: the base model and LoRAs they draw with, and what is written of it."""
