"""Activation checkpointing of nnU-Net's own networks."""
