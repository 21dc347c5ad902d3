"""What can go wrong in a demo; `nnunet_ext.cli.demo` prints the messages."""

from __future__ import annotations


class DemoError(Exception):
    """The user's input or folder doesn't allow the demo; the message names rule, value and cure."""


class ChildError(DemoError):
    """A command of nnU-Net failed; the message holds the command, its exit code and the end of its log."""
