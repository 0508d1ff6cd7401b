"""Charts rendered by both versions of Helm, and what a manifest is judged by."""

from __future__ import annotations

import functools
import json
import subprocess
from typing import TYPE_CHECKING, Any

import jsonschema
import yaml

from scripts.chart_tools import helm
from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

CHART = REPOSITORY / "helm" / "gradwatch"
# CRD schemas of other projects, for whoever has them: see docs/developing.md.
SCHEMAS = REPOSITORY.parent / "shared" / "schemas"
MAJORS = (3, 4)
NAMESPACE = "monitoring"

Manifest = dict[str, Any]


class RefusedError(Exception):
    """Helm said no."""


@functools.cache
def _template(major: int, chart: Path, values: str) -> str:
    command = [helm(major), "template", "gw", chart, "--namespace", NAMESPACE, "--values", "-"]
    done = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(done.stderr)
    return done.stdout


def render(values: str = "{}", *, major: int = 4, chart: Path = CHART) -> list[Manifest]:
    """The manifests that values give.

    Raises:
        RefusedError: the values are refused.
    """
    return parse(_template(major, chart, values))


def parse(text: str) -> list[Manifest]:
    """The documents of a YAML file."""
    return [document for document in yaml.load_all(text, _Loader) if document]


def the(manifests: list[Manifest], kind: str, name: str = "gw-gradwatch") -> Manifest:
    """The one of that kind and name."""
    found = [one for one in manifests if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    (one,) = found
    return one


def lint(major: int, chart: Path, values: str) -> subprocess.CompletedProcess[str]:
    """`helm lint --strict`."""
    command = [helm(major), "lint", "--strict", chart, "--values", "-"]
    return subprocess.run(command, input=values, capture_output=True, text=True, check=False)


def problems(manifest: Manifest) -> list[str]:
    """What its CRD's schema says against it, unknown fields too; nothing for kinds that have none there."""
    schema = _schemas().get((manifest["apiVersion"], manifest["kind"]))
    return [] if schema is None else _problems(manifest, schema)


def problems_of_jobset_spec(spec: Manifest) -> list[str]:
    """The same for a JobSet's spec that another kind holds."""
    return _problems(spec, _schemas()["jobset.x-k8s.io/v1alpha2", "JobSet"]["properties"]["spec"])


def has_schema(manifest: Manifest) -> bool:
    """Whether there is one."""
    return (manifest["apiVersion"], manifest["kind"]) in _schemas()


def _problems(value: Any, schema: Manifest) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{error.json_path}: {error.message[:300]}" for error in found]


class _Loader(yaml.CSafeLoader):
    """The C one: the schemas are large."""


@functools.cache
def _schemas() -> dict[tuple[str, str], Manifest]:
    found = {}
    for path in sorted(SCHEMAS.glob("*-crd.*")):
        crd = json.loads(path.read_text()) if path.suffix == ".json" else yaml.load(path.read_text(), _Loader)
        spec = crd["spec"]
        for version in spec["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """The same, with fields that are not in it refused, as the API server does with `--validate=strict`."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys():
        strict["additionalProperties"] = False
    return strict
