"""Starts a worker of this machine; called by `local.start` in a session of its own, which no terminal ends."""

from __future__ import annotations

import sys
from pathlib import Path

from nnunet_ext.cluster.local import submit

submit(Path(sys.argv[1]), sys.argv[2:])
