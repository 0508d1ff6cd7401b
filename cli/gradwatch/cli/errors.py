"""What the command line can fail with.

CliError            a message and an exit code
├── UsageError      the user asked for something that cannot be had: 2
└── UnavailableError  a collector or a file that should answer does not: 1
"""

from __future__ import annotations


class CliError(Exception):
    """A failure with a message for the user: what was wrong, where, and what to do."""

    exit_code = 1


class UsageError(CliError):
    """Wrong use of a command."""

    exit_code = 2


class UnavailableError(CliError):
    """Nothing to read from."""
