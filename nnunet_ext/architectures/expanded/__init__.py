"""meU-net: the expanded patch and its pass."""
