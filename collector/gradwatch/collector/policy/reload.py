"""Hot reload: a text that does not load leaves the policy as it is. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradwatch.collector.policy.document import load_policy, policy_hash
from gradwatch.collector.policy.problems import PolicyError

if TYPE_CHECKING:
    from gradwatch.collector.policy.model import Policy
    from gradwatch.collector.policy.problems import Problem


@dataclass(frozen=True, slots=True)
class InForce:
    """The policy in force, and how the newest attempt to load one went.

    Attributes:
        policy: None until one has loaded.
        hash: of the policy in force.
        problems: why the newest text did not load; empty when it did.
    """

    policy: Policy | None = None
    hash: str | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def last_reload_successful(self) -> bool:
        """Whether the newest text is the one in force."""
        return not self.problems


def reload(in_force: InForce, source: bytes, file: str) -> InForce:
    """Put a policy file's text in force, or keep the old policy and say why."""
    try:
        policy = load_policy(source, file)
    except PolicyError as error:
        return replace(in_force, problems=error.problems)
    return InForce(policy, policy_hash(policy))
