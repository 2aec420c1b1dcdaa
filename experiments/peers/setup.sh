#!/usr/bin/env bash
# Usage: experiments/peers/setup.sh [torch] [tf] [keras]      default: all three
# Makes one virtual environment for each library: $PEERBENCH/venv-torch, venv-tf, venv-keras.
# PEERBENCH is $TMPDIR/peerbench by default. PYTHON names a Python 3.11, by default python3.11.
set -euo pipefail
root=${PEERBENCH:-${TMPDIR:-/tmp}/peerbench}
mkdir -p "$root"

make() {  # NAME PACKAGE...
  local venv=$root/venv-$1
  [[ -x $venv/bin/python ]] || "${PYTHON:-python3.11}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet "${@:2}"
  echo "$venv/bin/python"
}

for part in "${@:-torch tf keras}"; do
  for name in $part; do
    case $name in
      torch)
        make torch torch==2.13.0 numpy pillow pyyaml huggingface_hub safetensors
        # Without their dependencies: pip would replace a CPU build of torch by the CUDA build that torchvision names.
        make torch --no-deps timm==1.0.31 torchvision==0.28.0 >/dev/null ;;
      tf) make tf tensorflow-cpu==2.21.0 keras==3.15.1 ;;
      keras) make keras keras==3.15.1 jax==0.10.2 ;;
      *) echo "setup.sh: $name: expected torch, tf or keras" >&2; exit 1 ;;
    esac
  done
done
