"""Models to ship: fused, checked, small, for nnU-Net's own prediction or for ONNX Runtime."""
