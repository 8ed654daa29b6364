"""Imitation: supervised fine-tuning on demonstrations."""
