"""Implicit decoder: points, their features and sparse prediction."""
