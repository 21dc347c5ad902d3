"""Memory-saving and fast networks for nnU-Net v2, selectable with its standard commands."""

__version__ = "0.1.0"
