#!/bin/sh
# Lay out what the init container brings to a training container: docker/training.sh FOLDER WHEEL
#
#   FOLDER/probe      the wheel, unpacked: for PYTHONPATH of the training
#   FOLDER/launcher   what `gradwatch run` imports besides, for that one process
#   FOLDER/bin        `gradwatch`
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
wheel=$2
install="${PYTHON:-python3} -m pip install --quiet --disable-pip-version-check --no-compile"
$install --no-deps --target "$folder/probe" "$wheel"
$install --target "$folder/launcher" -r "$here/launcher.txt"
# The commands in there would run in a Python that is not this one.
rm -rf "$folder/probe/bin" "$folder/launcher/bin"
mkdir -p "$folder/bin"
cp "$here/gradwatch" "$folder/bin/gradwatch"
chmod 755 "$folder/bin/gradwatch"
