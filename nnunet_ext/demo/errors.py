"""What can go wrong in a demo other than the user's input."""

from __future__ import annotations

from nnunet_ext.errors import UsageError


class ChildError(UsageError):
    """A command of nnU-Net failed; the message holds the command, its exit code and the end of its log."""
