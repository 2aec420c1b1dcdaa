#!/usr/bin/env bash
# shellcheck disable=SC2329  # main calls functions by the command's name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'END'
usage: ./launch.sh               this machine: install into .venv, then prepare, train, evaluate, caption
       ./launch.sh install       only create .venv and install
       ./launch.sh test [ARGS]   ruff, pyright, then pytest ARGS
       ./launch.sh help

  PRESET=experiments/shapes.py   the preset; WORKDIR=runs/NAME: the run; DATA_DIR=data: data sets and features
  PYTHON=python3.12              Python 3.11 or newer; default: the first one on the PATH
  EXTRA=cuda12|cuda13|tpu        the accelerator; default: chosen by the NVIDIA driver; EXTRA= for none
  SPLIT=test                     the split to score and caption at the end: test or val
  MANUAL_DIR=DIR                 your own files, for data sets that need them
  DRY_RUN=1                      print every command, run none

TPU VMs:  TPU_NAME=... ZONE=... TYPE=v6e-8 WORKDIR=gs://... DATA_DIR=gs://... ./launch.sh COMMAND
  create               SPOT=1: a spot VM; VERSION=...: the runtime image; CREATE_FLAGS='...': more flags for gcloud
  setup                copy the commit REV=HEAD to all workers and install it there
  run [-- PROGRAM..]   start PROGRAM on all workers, detached; default: flaxcap train. WORKER=0: only on that worker
  watch [-- PROGRAM..] create, set up and run, again after each preemption, crash or exit status 75 ("saved, start
                       me again"), until PROGRAM ends with status 0. Gives up after MAX_RESTARTS=5 restarts
                       without a newer checkpoint. Polls every WATCH_INTERVAL=60 seconds
  logs | stop | delete follow the log of WORKER=0; ask the program to save and end; delete the VM
  (no command)         watch, then delete
A VM with several workers needs its key in the SSH agent: ssh-add ~/.ssh/google_compute_engine
END
}

say() { printf '\n== %s\n' "$*" >&2; }
die() { printf 'launch.sh: %s\n' "$*" >&2; exit 1; }
dry() { [[ ${DRY_RUN:-0} == 1 ]]; }
if dry; then exec 3>&1; fi  # commands are printed to 3, because $(...) captures 1

execute() {
  local word line='' quote=\'
  if ! dry; then "$@"; return; fi
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word=$quote${word//$quote/$quote\\$quote$quote}$quote; fi
    line+=" $word"
  done
  echo "${line# }" >&3
}

# ---- this machine

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {  # prints the first suitable Python; without one, prints the unsuitable ones and fails
  local python found='' candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for python in "${candidates[@]}"; do
    if new_enough "$python"; then echo "$python"; return; fi
    if command -v "$python" >/dev/null; then found+="${found:+, }$python is $("$python" -V 2>&1)"; fi
  done
  echo "${found:-there is no ${candidates[*]}}"
  return 1
}

accelerator() {  # prints the extra to install: EXTRA, or the newest CUDA that the NVIDIA driver supports
  local driver
  if [[ -n ${EXTRA+set} ]]; then echo "$EXTRA"; return; fi
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p) || return 0
  [[ $driver =~ ^([0-9]+)\. ]] || return 0
  if ((BASH_REMATCH[1] >= 580)); then EXTRA=cuda13; else EXTRA=cuda12; fi
  say "NVIDIA driver $driver: EXTRA=$EXTRA (EXTRA= for none)"
  echo "$EXTRA"
}

environment() {  # EXTRAS: installs the project in .venv; pip runs only after a change of pyproject.toml
  local python extras=$1 stamp=.venv/installed-${1:-base} key
  if ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || die "flaxcap needs Python 3.11 or newer, but $python. Name one: PYTHON=... ./launch.sh"
    say "creating .venv with $python"
    execute "$python" -m venv --clear .venv
  fi
  key=$({ pwd; cat pyproject.toml; } | cksum)  # the scripts of a moved .venv have the old path
  if [[ -r $stamp && $(<"$stamp") == "$key" ]]; then return; fi
  say "installing flaxcap${extras:+[$extras]}; the first time takes minutes"
  execute .venv/bin/python -m pip install --quiet -e ".${extras:+[$extras]}"
  dry || echo "$key" >"$stamp"
}

use_huge_pages() {  # with 2 MB pages instead of 4 KB pages, a training step on a CPU takes 4 to 8 percent less time
  local setting=/sys/kernel/mm/transparent_hugepage/enabled
  if [[ -r $setting && $(<"$setting") == *'[madvise]'* && ${GLIBC_TUNABLES:-} != *glibc.malloc.hugetlb* ]]; then
    execute export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
  fi
}

main_job() {
  local data=(--config="$PRESET" --data_dir="$DATA_DIR") work=--workdir=$WORKDIR
  environment "$(accelerator)"
  use_huge_pages
  say "preparing $DATA_DIR"
  execute .venv/bin/flaxcap prepare "${data[@]}" ${MANUAL_DIR:+--manual_dir="$MANUAL_DIR"}
  say "training in $WORKDIR"
  execute .venv/bin/flaxcap train "${data[@]}" "$work"
  say "scoring split $SPLIT"
  execute .venv/bin/flaxcap evaluate "${data[@]}" "$work" --split="$SPLIT"
  say "captioning images of it"
  execute .venv/bin/flaxcap caption "$work" --data_dir="$DATA_DIR" --split="$SPLIT" --num_images=4 --plot \
    --out_dir="$WORKDIR/captions"
}

tests() {  # pytest runs last, so that its summary is the last line
  local cores parallel=()
  environment "${EXTRA:+$EXTRA,}test"
  cores=$(getconf _NPROCESSORS_ONLN)
  if ((cores > 1)); then parallel=(-n "$((cores < 4 ? cores : 4))" --dist=loadfile --no-loadscope-reorder); fi
  execute .venv/bin/python -m ruff check .
  execute .venv/bin/python -m ruff format --check .
  execute .venv/bin/python -m pyright --pythonpath .venv/bin/python
  execute .venv/bin/python -m pytest ${parallel[@]+"${parallel[@]}"} "$@"
}

# ---- TPU VMs, on this machine

tpu() { execute gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet; }
on_workers() { tpu ssh "$TPU_NAME" --worker="${WORKER:-all}" --command="$1"; }

create() {
  local version=${VERSION:-} flags
  case $TYPE in
    v2-* | v3-* | v4-*) : "${version:=tpu-ubuntu2204-base}" ;;
    v5litepod-*) : "${version:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${version:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${version:=v2-alpha-tpuv6e}" ;;
    *) : "${version:?set VERSION to the runtime image for TYPE=$TYPE, which is not known here}" ;;
  esac
  read -ra flags <<<"--version=$version ${SPOT:+--spot }${CREATE_FLAGS:-}"
  tpu create "$TPU_NAME" --accelerator-type="$TYPE" "${flags[@]}"
}

setup() {
  local tarball=build/$TPU_NAME.tar.gz unpack
  git diff --quiet HEAD 2>/dev/null || say "what is not committed is not copied"
  execute mkdir -p build
  execute git archive --format=tar.gz --output="$tarball" "${REV:-HEAD}"
  tpu scp "$tarball" "$TPU_NAME:flaxcap.tar.gz" --worker=all
  unpack='mkdir -p flaxcap && find flaxcap -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +'
  WORKER=all on_workers "$unpack && tar -xzf flaxcap.tar.gz -C flaxcap && flaxcap/launch.sh worker install"
}

program_states() {  # prints the distinct states of the workers: bare, absent, running, died, exited N
  local out
  out=$(on_workers 'if [ -e flaxcap/.ready ]; then flaxcap/launch.sh worker state; else echo state=bare; fi') ||
    { echo unreachable; return; }
  sed -n 's/^.*state=//p' <<<"$out" | sort -u
}

run() {
  local name line
  if (($# == 0)); then
    for name in WORKDIR DATA_DIR; do
      [[ ${!name} == gs://?* ]] || die "$name=${!name}: must be a gs:// path, since a TPU VM's disks go with it"
    done
    set -- flaxcap train --config="$PRESET" --workdir="$WORKDIR" --data_dir="$DATA_DIR" --distributed=auto
  fi
  case $(program_states) in
    *running*) die "already running on $TPU_NAME: ./launch.sh logs shows it, ./launch.sh stop ends it" ;;
    *bare*) die "$TPU_NAME is not set up: ./launch.sh setup" ;;
    *unreachable*) die "$TPU_NAME does not answer" ;;
  esac
  printf -v line ' %q' "$@"
  on_workers "flaxcap/launch.sh worker start$line"
}

stop() { on_workers 'flaxcap/launch.sh worker stop'; }
logs() { tpu ssh "$TPU_NAME" --worker="${WORKER:-0}" --command='tail -n 100 -F flaxcap.log'; }
delete() { tpu delete "$TPU_NAME"; }

vm_state() {
  local out
  if out=$(tpu describe "$TPU_NAME" --format='value(state)' 2>&1); then
    grep -xE '[A-Z_]+' <<<"$out" || true  # gcloud may add notices of its own
  elif [[ $out == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$out" >&2
  fi
}

newest_step() {  # prints the highest number that names a directory in WORKDIR
  [[ $WORKDIR == gs://* ]] || return 0
  { gcloud storage ls "$WORKDIR/**" 2>/dev/null || true; } |
    cut -c"${#WORKDIR}-" | { grep -oE '/[0-9]+/' || true; } | tr -d / | sort -n | tail -n 1
}

again() { ./launch.sh "$@" || { say "$1 failed; trying again in $WATCH_INTERVAL s"; return 1; }; }

watch() {  # each turn observes the state and takes one action, so that watch itself can be restarted at any time
  local vm states step last='' restarts=0
  WATCH_INTERVAL=${WATCH_INTERVAL:-60}
  REV=$(git rev-parse "${REV:-HEAD}")
  export REV  # a VM that is created again gets the code that the run began with
  if dry; then vm_state; delete; create; setup; run "$@"; return; fi
  while true; do
    vm=$(vm_state)
    case $vm in
      PREEMPTED | TERMINATED) say "$TPU_NAME is $vm"; if again delete; then continue; fi ;;
      MISSING) if again create; then continue; fi ;;
      READY)
        states=$(program_states)
        case $states in
          unreachable) say "$TPU_NAME does not answer" ;;
          *bare*) if again setup; then continue; fi ;;
          *died* | *exited\ [1-9]*)
            step=$(newest_step)
            say "the program: ${states//$'\n'/, }; newest checkpoint: ${step:-none}"
            if [[ $step != "$last" ]]; then restarts=0 last=$step; fi
            if ((restarts++ >= ${MAX_RESTARTS:-5})); then
              on_workers 'tail -n 30 flaxcap.log' || true
              die "gave up: ${MAX_RESTARTS:-5} restarts in a row brought no newer checkpoint"
            fi
            if again stop; then again run -- "$@" || true; fi ;;
          *absent*) if again stop; then again run -- "$@" || true; fi ;;
          'exited 0') say "the program ended with status 0"; return ;;
        esac ;;
      *) say "$TPU_NAME is ${vm:-in an unknown state}; waiting" ;;
    esac
    sleep "$WATCH_INTERVAL"
  done
}

# ---- TPU VMs, on each worker, in the copy that setup has written

worker() {
  local python at=$HOME/flaxcap
  exec 9>>"$at.lock"  # held while the program runs; unlike a pid file, the lock ends with a reboot or kill
  case $1 in
    install)
      if ! python=$(find_python); then  # the runtime images have Python 3.10
        python3 -m pip install --quiet --user uv
        python3 -m uv python install --quiet 3.12
        python=$(python3 -m uv python find --system 3.12)
      fi
      PYTHON=$python environment tpu
      touch .ready ;;
    state) if flock -ns 9; then cat "$at.status" 2>/dev/null || echo state=absent; else echo state=running; fi ;;
    start)
      flock -n 9 || die "already running"
      echo state=died >"$at.status"  # replaced when the program exits
      use_huge_pages
      # A new session outlives the ssh connection. TERM ends the program, not the shell that writes its exit status.
      # shellcheck disable=SC2016
      PATH=$PWD/.venv/bin:$PATH setsid bash -c 'trap : TERM; "$@" 9>&-; echo "state=exited $?" >"$0"; kill -KILL 0' \
        "$at.status" "${@:2}" </dev/null >>"$at.log" 2>&1 &
      echo $! >"$at.pid" ;;
    stop)
      if flock -ns 9; then return; fi
      kill -TERM -- "-$(<"$at.pid")" || true
      flock -w "${STOP_TIMEOUT:-60}" 9 || { kill -KILL -- "-$(<"$at.pid")"; flock -w 10 9; } ;;
  esac
}

main() {
  local command=${1:-}
  shift $(($# > 0))
  PRESET=${PRESET:-experiments/shapes.py}
  WORKDIR=${WORKDIR:-runs/$(basename "$PRESET" .py)}
  DATA_DIR=${DATA_DIR:-data}
  SPLIT=${SPLIT:-test}
  case $command in
    '') if [[ -z ${TPU_NAME:-} ]]; then main_job; else ./launch.sh watch && ./launch.sh delete; fi ;;
    install) environment "$(accelerator)" ;;
    test) tests "$@" ;;
    create | setup | run | watch | logs | stop | delete)
      : "${TPU_NAME:?set it to the name of the TPU VM}" "${ZONE:?set it to the zone of the TPU VM, as in us-east5-b}"
      case $command in create | watch) : "${TYPE:?set it to the type of the TPU, as in v6e-8}" ;; esac
      dry || command -v gcloud >/dev/null || die "no gcloud on the PATH: install the Google Cloud CLI"
      if [[ ${1:-} == -- ]]; then shift; fi
      "$command" "$@" ;;
    worker) worker "$@" ;;
    help | -h | --help) usage ;;
    *) usage >&2; die "no such command: $command" ;;
  esac
}

main "$@"; exit  # bash reads a script while it runs: without exit, an edit would change a running watch
