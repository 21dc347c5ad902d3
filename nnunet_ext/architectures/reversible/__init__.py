"""Reversible and invertible blocks: chains of steps that recompute what they do not keep."""
