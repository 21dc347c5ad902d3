"""Measurements of networks: memory of a training step."""
