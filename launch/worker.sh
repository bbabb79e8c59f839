#!/usr/bin/env bash
# What the other scripts run on each machine that trains; it comes with the commit that `setup` installs there.
#
#   worker.sh install EXTRAS               Python 3.12 and this package with these extras, in ~/mtp_jax_venv
#   worker.sh train RUN PRESET ARGUMENT... start mtp_jax.train in the background, unless the run is already under way
#   worker.sh status RUN                   one line: running, exited and its code, lost (no code), or absent
#   worker.sh logs RUN LINES               the last lines that the run printed
#   worker.sh stop RUN SECONDS             end the run; it has this many seconds to save a checkpoint
#
# --dry-run before the verb prints what it would run. ~/mtp_jax_runs/RUN holds the log, lock, pid and exit code of a run.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$HERE/lib.sh"
if [[ ${1:-} == --dry-run ]]; then
  opt_dry_run=true
  shift
fi
if [[ ${1:-} == -h || ${1:-} == --help || $# -eq 0 ]]; then
  usage
  exit 0
fi
verb=$1 name=${2:-} VENV=$HOME/mtp_jax_venv
shift
if [[ $verb != install ]]; then
  check_name run "$name"
  STATE=$HOME/mtp_jax_runs/$name
  shift
fi

# A run holds a lock while it lives; no crash leaves it locked.
running() { [[ -e $STATE/lock ]] && ! flock --nonblock "$STATE/lock" true; }

install_package() { # extras
  local extras=$1 uv=$HOME/.local/bin/uv
  # The system Python of most TPU images is too old for this package, so uv brings one.
  if [[ ! -x $uv ]]; then uv=$(command -v uv || true); fi
  if [[ -z $uv ]]; then
    run 600 python3 -m pip install --user --quiet uv
    uv=$HOME/.local/bin/uv
  fi
  [[ -x $VENV/bin/python ]] || run 600 "$uv" venv --quiet --python 3.12 "$VENV"
  run 1800 "$uv" pip install --quiet --python "$VENV/bin/python" --editable "${ROOT}[$extras]"
}

start_training() { # preset argument...
  local preset=$1
  shift
  if [[ $opt_dry_run == true ]]; then
    printf '%s\n' "$(quoted "$VENV/bin/python" -m mtp_jax.train "$@")"
    return
  fi
  [[ -x $VENV/bin/python ]] || die "there is no $VENV/bin/python; run setup first."
  mkdir -p "$STATE"
  exec 9>"$STATE/lock"
  if ! flock --nonblock 9; then
    say "run $name is already under way."
    return
  fi
  rm -f "$STATE/exit" "$STATE/pid"
  # shellcheck source=launch/env.sh
  if [[ $preset != none ]]; then . "$HERE/env.sh" "$preset"; fi
  cd "$ROOT"
  if [[ -r $HOME/.config/mtp_jax/secrets ]]; then
    set -a
    # shellcheck disable=SC1091
    . "$HOME/.config/mtp_jax/secrets"
    set +a
  fi
  # Detached from the connection that started it. A shutdown also signals the shell around it, which must outlive it to
  # record its exit code. The shell does not pass the signal on: a second one ends a run without a checkpoint.
  # shellcheck disable=SC2016
  nohup setsid bash -c '
    trap : TERM INT
    (echo "$BASHPID" >"$0/pid"; exec "$@")
    echo "$?" >"$0/exit.part" && mv "$0/exit.part" "$0/exit"
  ' "$STATE" "$VENV/bin/python" -m mtp_jax.train "$@" >>"$STATE/log" 2>&1 </dev/null &
  say "run $name started on $(hostname)."
}

print_status() {
  local state=absent code=-
  if running; then
    state=running
  elif [[ -e $STATE/exit ]]; then
    state=exited code=$(<"$STATE/exit")
  elif [[ -e $STATE/lock ]]; then
    state=lost
  fi
  echo "mtp_jax-status host=$(hostname) run=$name state=$state code=$code"
}

stop_training() { # seconds
  local waited=0
  running || { say "run $name is not under way on $(hostname)."; return; }
  kill -TERM "$(<"$STATE/pid")" 2>/dev/null || true
  while running; do
    if ((waited >= $1)); then
      say "run $name did not end within $1 seconds and is killed; it resumes from its last checkpoint."
      kill -KILL "$(<"$STATE/pid")" 2>/dev/null || true
      return
    fi
    sleep 1
    waited=$((waited + 1))
  done
  say "run $name ended on $(hostname)."
}

case $verb in
  install) install_package "${name:-tpu,gcs}" ;;
  train) start_training "$@" ;;
  status) print_status ;;
  logs) tail -n "${1:-100}" "$STATE/log" ;;
  stop) stop_training "${1:-300}" ;;
  *) die "unknown verb $verb; see: $0 --help" ;;
esac
