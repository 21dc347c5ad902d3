"""Times that were measured, over those of default nnU-Net on the same plans (docs/benchmarks, tests/advise).

Operations say too little of a time: small kernels wait for the host, and norms take long that hold no product.
"""

from __future__ import annotations

# A step of 128x128x128, batch 2, not compiled, on one H100: docs/benchmarks/2026-11-27-gpu.
STEP = {
    "nnUNetTrainerActivationCheckpointing": 2.82,
    "nnUNetTrainerHalfWidth": 0.80,
    "nnUNetTrainerReversible": 3.16,
    "nnUNetTrainerInvertibleNoVAE": 2.95,
    "nnUNetTrainerPartiallyInvertibleNoVAE": 5.22,
    "nnUNetTrainerMeUNet": 0.80,
    "nnUNetTrainerMeCheckpointing": 3.28,
}

# Prediction of a patch of 128x128x128 as deployed, float32, one CPU thread: docs/benchmarks/2026-11-21-faster-fusion.
PREDICTION = {
    "nnUNetTrainerHalfWidth": 0.365,
    "nnUNetTrainerHalfWidthBN": 0.216,
    "nnUNetTrainerFasterFusion": 0.970,
    "nnUNetTrainerFasterFusionBN": 0.583,
    "nnUNetTrainerFasterFusionFast": 0.450,
}
