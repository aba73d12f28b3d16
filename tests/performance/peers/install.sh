#!/usr/bin/env bash
# Makes the environment of the libraries that the engines are timed against (make peers):
#     tests/performance/peers/install.sh FOLDER [PYTHON]
# It is one of its own, for they ask for packages that this project does without. Python 3.11: the
# last one that TorchOpt has a package for, and the first that this JAX has.
set -euo pipefail
folder=$1
python=${2:-python3.11}
here=$(cd "$(dirname "$0")" && pwd)

"$python" -c 'import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else "the peers need Python 3.11; set PEERS_PYTHON=")'
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip "$@" --quiet --disable-pip-version-check --constraint "$here/constraints.txt"; }

pip install torch 'jax[cpu]' optree graphviz setuptools cython
# Without its dependencies: it asks for functorch, which would bring a torch of 2022.
pip install --no-deps torchopt

# learn2learn's package does not build on Python 3.11 (C sources that an old Cython made, for its
# data loaders). Its MAML is plain Python: that is taken from the package as it is.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
if ! pip install --no-deps --no-build-isolation learn2learn 2>"$sources/log"; then
    echo "learn2learn does not build here; its Python files are taken without its data loaders"
    pip download --no-deps --no-build-isolation --no-binary learn2learn --dest "$sources" learn2learn
    tar xzf "$sources"/learn2learn-*.tar.gz -C "$sources"
    cp -r "$sources"/learn2learn-*/learn2learn "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
fi
