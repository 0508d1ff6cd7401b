"""The identities file: from its text to those it names. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gradwatch.collector.access.identity import ALL_JOBS, Identity, Role
from gradwatch.collector.errors import AccessError
from gradwatch.collector.policy.fields import Fields
from gradwatch.collector.policy.problems import PolicyError, Problem
from gradwatch.collector.policy.text import Items, Section, parse

if TYPE_CHECKING:
    from gradwatch.collector.policy.text import Tree

EXAMPLE = "identities: [{name: alice, role: viewer, token_sha256: …}]"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAKE_ONE = "`gradwatch token new` makes a token and this"


def read_identities(source: bytes, file: str) -> tuple[dict[bytes, Identity], dict[str, Identity]]:
    """Read the file: YAML, or JSON, with the one key `identities`.

    What a message quotes is never what could be a token: whoever names the wrong file must not find its
    content in a log.

    Args:
        source: its content.
        file: its name, for messages.

    Returns:
        Those known by a token, by its SHA-256; and those known by a certificate, by the name in it.

    Raises:
        AccessError: it is of no use. All that is wrong is in the message, with lines and keys.
    """
    try:
        tree = parse(source, file)
    except PolicyError as error:
        raise AccessError(str(error)) from None
    reader = _Reader(file)
    reader.read(tree)
    if reader.problems:
        lines = "\n".join(str(problem) for problem in sorted(reader.problems, key=lambda one: one.line))
        raise AccessError(lines)
    return reader.by_digest, reader.by_certificate


class _Reader:
    def __init__(self, file: str) -> None:
        self.problems: list[Problem] = []
        self.by_digest: dict[bytes, Identity] = {}
        self.by_certificate: dict[str, Identity] = {}
        self._file = file
        self._names: dict[str, int] = {}

    def read(self, tree: Tree) -> None:
        if not isinstance(tree, Section):
            self._note(tree.line, "", f"must be a section such as {EXAMPLE}")
            return
        top = Fields(self._file, "", tree, 1, self.problems)
        listed = tree.entries.get("identities")
        if listed is None:
            self._note(tree.line, "identities", "is missing; it must be a list")
        elif not isinstance(listed.node, Items):
            self._note(listed.line, "identities", f"must be a list, as in {EXAMPLE}")
        elif not all(isinstance(node, Section) for node in listed.node.nodes):
            self._note(listed.line, "identities", f"each of them must be a section, as in {EXAMPLE}")
        for fields in top.sections("identities") or [] if not self.problems else []:
            self._read_one(fields)
        top.finish()

    def _read_one(self, fields: Fields) -> None:
        name = fields.text("name", required=True)
        role = fields.required_word("role", Role)
        jobs = fields.texts("jobs", 'a pattern such as "llm-*", or a list of patterns') or (ALL_JOBS,)
        token, certificate = fields.text("token_sha256"), fields.text("certificate")
        fields.finish()
        if name is not None:
            self._check_name(fields, name)
        if fields.has("token_sha256") == fields.has("certificate"):
            fields.note(fields.line, "", "must have either token_sha256 or certificate, and one of them")
        if token is not None and not _SHA256.fullmatch(token):
            fields.note(
                fields.line_of("token_sha256"),
                "token_sha256",
                f"must be the SHA-256 of a token, 64 digits of 0-9 and a-f; {_MAKE_ONE}",
            )
            token = None
        if name is None or role is None:
            return
        identity = Identity(name, role, jobs)
        if token is not None and bytes.fromhex(token) in self.by_digest:
            fields.note(fields.line_of("token_sha256"), "token_sha256", "another identity has the same")
        elif token is not None:
            self.by_digest[bytes.fromhex(token)] = identity
        if certificate is not None and certificate in self.by_certificate:
            fields.note(fields.line_of("certificate"), "certificate", "another identity has the same")
        elif certificate is not None:
            self.by_certificate[certificate] = identity

    def _check_name(self, fields: Fields, name: str) -> None:
        line = fields.line_of("name")
        if not NAME.fullmatch(name):
            fields.note(line, "name", "may hold letters, digits, '.', '_', '@' and '-', 128 at most")
        elif name in self._names:
            fields.note(line, "name", f"{name} is there twice; first in line {self._names[name]}")
        self._names.setdefault(name, line)

    def _note(self, line: int, key: str, message: str) -> None:
        self.problems.append(Problem(self._file, line, key, message))
