"""What a user can put right; `nnunet_ext.cli` prints the message as one line and exits with status 2."""

from __future__ import annotations


class UsageError(Exception):
    """The user's input, data or disk doesn't allow it; the message names rule, value and cure."""
