#!/usr/bin/env bash
# Make the committed protobuf stubs, or with --check say whether they are up to date.
#
# The generators live in an environment of their own: grpcio-tools needs an older
# protobuf than the one Gradwatch runs with. The code they make runs on protobuf 5-7.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.cache/stubs-venv
if [ ! -x "$tools/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$tools"
  "$tools/bin/pip" install --quiet --disable-pip-version-check grpcio-tools==1.71.2 mypy-protobuf==3.7.0
fi

out=protos
if [ "${1:-}" = "--check" ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi

PATH="$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  gradwatch/protos/v1/gradwatch.proto

if [ "$out" != protos ]; then
  for made in "$out"/gradwatch/protos/v1/*; do
    if ! cmp -s "$made" "protos/gradwatch/protos/v1/$(basename "$made")"; then
      echo "stubs: $(basename "$made") is not what gradwatch.proto gives; run: make stubs" >&2
      exit 1
    fi
  done
  echo "stubs: up to date"
fi
