"""What can go wrong in the collector.

CollectorError
├── IllegalTransitionError   a bug: an incident's step that is not in the table
├── StoreError               the store cannot be read or written just now
├── OperatorError            what an operator asks for cannot be done
├── StateDirError            the state directory is of no use
│   ├── StateDirInUseError   another collector holds it
│   └── NoStateError         no collector has ever kept anything there
├── AccessError              a certificate or the identities file is of no use
├── ForbiddenError           somebody asks for what is not theirs
└── BindError                an address cannot be bound
    ├── PortTakenError
    └── NotLoopbackError
"""

from __future__ import annotations


class CollectorError(Exception):
    """Anything this package raises on purpose."""


class IllegalTransitionError(CollectorError):
    """An incident was asked for a step that its status does not allow."""


class StoreError(CollectorError):
    """The store cannot be read or written just now; what was to be stored is not."""


class OperatorError(CollectorError):
    """What an operator asks for cannot be done."""


class StateDirError(CollectorError):
    """The state directory is of no use."""


class StateDirInUseError(StateDirError):
    """Another collector holds the state directory."""


class NoStateError(StateDirError):
    """No collector has ever kept anything in that state directory."""


class AccessError(CollectorError):
    """A certificate, its key, or the identities file is of no use."""


class ForbiddenError(CollectorError):
    """Somebody asks for what is not theirs."""


class BindError(CollectorError):
    """An address cannot be bound."""


class PortTakenError(BindError):
    """The port that was asked for is taken."""


class NotLoopbackError(BindError):
    """An address that others can reach needs TLS and a token."""
