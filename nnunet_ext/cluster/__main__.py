"""Starts a worker of this machine; called by `local.start` in a session of its own, which no terminal ends."""

from __future__ import annotations

import sys
from pathlib import Path

from nnunet_ext.cluster.local import submit

output, number, cores, *gpus = sys.argv[1:]
submit(Path(output), int(number), int(cores), gpus)
