# shellcheck shell=bash
# Shared by the launch scripts: options, messages, calls with a time limit, and what an interrupted script reports.
# Kept to bash 3.2, which macOS ships: no associative arrays, no mapfile, and "${a[@]+"${a[@]}"}" for arrays that may be empty.

# shellcheck disable=SC2034 # the scripts that source this file use them
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TICK=${MTP_JAX_TICK:-0.2} # seconds between checks of a call that is under way
opt_dry_run=false opt_help=false
ARGS=() OUT='' ERR='' CHILD='' CATCH='' SCRATCH='' SIGNALLED=false CREATING=false
EXISTING=() # in pairs: what exists, and the command that deletes it

say() { printf '%s\n' "$*" >&2; }

# Exit code 2: the user can fix it. 1: the cloud refused.
die() { printf 'error: %s\n' "$*" >&2; exit 2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# The comment at the head of a script is its help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# Reads options into the opt_ variables that a script declares, and all else into ARGS. An option declared as true or false
# takes no value.
parse() {
  local name var
  while (($#)); do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --) shift; ARGS+=("$@"); return ;;
      --*)
        name=${1%%=*} && var=opt_${name#--} && var=${var//-/_}
        [[ $var =~ ^[a-z0-9_]+$ && -n ${!var+x} ]] || die "unknown option $name; see: $0 --help"
        if [[ ${!var} == true || ${!var} == false ]]; then
          [[ $1 != *=* ]] || die "$name takes no value."
          printf -v "$var" true
        elif [[ $1 == *=* ]]; then
          printf -v "$var" %s "${1#*=}"
        else
          (($# > 1)) || die "$name needs a value."
          shift
          printf -v "$var" %s "$1"
        fi
        ;;
      *) ARGS+=("$1") ;;
    esac
    shift
  done
}

need() { # option...: each must have been given
  local name var
  for name; do
    var=opt_${name//-/_}
    [[ -n ${!var} ]] || die "--$name is missing; see: $0 --help"
  done
}

# An identifier that is valid as a label, a folder and a Kubernetes name alike.
check_name() { # option value
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--$1 $2: should be 1 to 40 lower-case letters, digits and hyphens, beginning with a letter."
}

check_whole() { # option value: a number of seconds or attempts
  [[ $2 =~ ^[0-9]{1,7}$ ]] || die "--$1 $2: should be a whole number."
}

# Words as one line that a shell reads back unchanged.
quoted() {
  local word line='' option plain='^[A-Za-z0-9_./:=,@%+~-]+$'
  for word; do
    if [[ ! $word =~ $plain ]]; then
      option=''
      if [[ $word =~ ^--[a-z-]+= ]]; then option=${BASH_REMATCH[0]}; fi
      word=${word#"$option"}
      word="$option'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

scratch() { [[ -n $SCRATCH ]] || SCRATCH=$(mktemp -d); }

# Runs a command for at most this many seconds; returns 124 if it took longer. It runs in the background and is polled:
# between polls bash handles a signal at once, but during a foreground command only after that has ended.
limited() { # seconds command...
  local seconds=$1 started=$SECONDS status=0
  shift
  # Only the command's own output is captured; what a trap prints meanwhile is for the user.
  if [[ -n $CATCH ]]; then
    "$@" </dev/null >"$CATCH/out" 2>"$CATCH/err" &
  else
    "$@" </dev/null &
  fi
  CHILD=$!
  while kill -0 "$CHILD" 2>/dev/null; do
    if ((SECONDS - started > seconds)); then
      kill -TERM "$CHILD" 2>/dev/null || true
      sleep "$TICK"
      kill -KILL "$CHILD" 2>/dev/null || true
      wait "$CHILD" 2>/dev/null || true
      CHILD=''
      return 124
    fi
    sleep "$TICK"
  done
  wait "$CHILD" || status=$?
  CHILD=''
  return "$status"
}

# Runs or, with --dry-run, prints a command whose output the user should see.
run() { # seconds command...
  if [[ $opt_dry_run == true ]]; then
    printf '%s\n' "$(quoted "${@:2}")"
  else
    limited "$@"
  fi
}

# Runs a command and keeps its output in OUT and ERR; with --dry-run, prints it and keeps nothing.
call() { # seconds command...
  local status=0
  OUT='' ERR=''
  if [[ $opt_dry_run == true ]]; then
    printf '%s\n' "$(quoted "${@:2}")"
    return 0
  fi
  scratch
  CATCH=$SCRATCH
  limited "$@" || status=$?
  CATCH=''
  OUT=$(<"$SCRATCH/out") ERR=$(<"$SCRATCH/err")
  ((status != 124)) || ERR="no answer within $1 seconds: $(quoted "${@:2}")"
  return "$status"
}

exists() { EXISTING+=("$1" "$2"); } # something that costs money while it exists: what, how to delete it

on_signal() { # exit code
  trap '' INT TERM HUP
  SIGNALLED=true
  local child
  # Bash starts background jobs with Ctrl-C ignored.
  for child in $(jobs -p); do kill -TERM "$child" 2>/dev/null || true; done
  exit "$1"
}

on_exit() {
  local status=$? i
  [[ -z $SCRATCH ]] || rm -rf "$SCRATCH"
  if [[ $opt_dry_run == false && ${#EXISTING[@]} -gt 0 ]] && { $SIGNALLED || { $CREATING && ((status)); }; }; then
    if $SIGNALLED; then say "interrupted."; fi
    for ((i = 0; i < ${#EXISTING[@]}; i += 2)); do
      say "${EXISTING[i]} exists or may exist, and costs money until it is deleted with:"
      say "    ${EXISTING[i + 1]}"
    done
  fi
  return "$status"
}

trap on_exit EXIT
trap 'on_signal 130' INT
trap 'on_signal 143' TERM
trap 'on_signal 129' HUP

need_program() { # program, how to get it
  [[ $opt_dry_run == true ]] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# ---- git

# Sets COMMIT and REMOTE, and refuses what workers could not check out.
find_commit() { # true if the commit is uploaded and need not be pushed
  local upload=$1 dirty branch
  need_program git "https://git-scm.com/downloads"
  git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1 || die "$ROOT is not a git repository, and setup installs a commit."
  dirty=$(git -C "$ROOT" status --porcelain | head -n 1)
  [[ -z $dirty ]] || die "there are uncommitted changes (${dirty:3}); run: git commit --all, or: git stash"
  COMMIT=$(git -C "$ROOT" rev-parse HEAD)
  [[ $upload == false ]] || return 0
  REMOTE=$(git -C "$ROOT" remote get-url origin 2>/dev/null) ||
    die "the repository has no remote 'origin' that workers could clone; run: git remote add origin URL, or add --upload"
  if [[ -z $(git -C "$ROOT" branch --remotes --contains "$COMMIT" 2>/dev/null) ]]; then
    branch=$(git -C "$ROOT" symbolic-ref --quiet --short HEAD || echo HEAD)
    die "commit ${COMMIT:0:12} is not pushed; run: git push origin $branch, or add --upload"
  fi
  # Workers do not have your SSH key. If the repository is not public, --upload sends the commit.
  if [[ $REMOTE =~ ^(ssh://)?git@([^:/]+)[:/](.+)$ ]]; then REMOTE=https://${BASH_REMATCH[2]}/${BASH_REMATCH[3]}; fi
  [[ ! $REMOTE =~ ://[^/]*@ ]] || die "the URL of 'origin' holds a password or token, which would show on command lines; add --upload"
}

check_config() { # file: workers see only what is in the commit, or a bucket
  [[ $1 != gs://* ]] || return 0
  [[ $1 != /* ]] || die "--config $1: should be relative to the repository, or in a bucket (gs://...)."
  [[ -f $ROOT/$1 ]] || die "--config $1: there is no such file in $ROOT."
  git -C "$ROOT" ls-files --error-unmatch "$1" >/dev/null 2>&1 ||
    die "--config $1 is not part of the commit that workers install; run: git add $1 && git commit"
}

# ---- does it fit?

# Refuses a run that the compiler says does not fit the chips, unless --force.
preflight() { # topology config override...
  local topology=$1 status=0 python=${PYTHON:-}
  shift
  if [[ ${opt_force:-false} == true ]]; then return 0; fi
  if [[ ! -f $ROOT/mtp_jax/preflight.py ]]; then
    say "note: mtp_jax.preflight is not here, so it is not checked whether the run fits $topology."
    return 0
  fi
  case $topology in
    v2:* | v3:* | tpu7x:* | *:1x1)
      say "note: preflight knows v4, v5e, v5p and v6e, from 2x2 on, so it is not checked whether the run fits $topology."
      return 0
      ;;
  esac
  if [[ -z $python ]]; then
    python=python3
    if [[ -x $ROOT/.venv/bin/python ]]; then python=$ROOT/.venv/bin/python; fi
  fi
  call 1800 env JAX_PLATFORMS=cpu PYTHONPATH="$ROOT" "$python" -m mtp_jax.preflight --config "$@" --topology "$topology" || status=$?
  [[ -z $OUT ]] || say "$OUT"
  case $status in
    0) ;;
    1) # Python also ends with 1 if the package is not installed
      if [[ $ERR == *Traceback* || $ERR == *"No module named"* ]]; then
        die "preflight cannot run here (${ERR##*$'\n'}); run: make $ROOT/.venv/.test, or: pip install '.[preflight]', or add --force"
      fi
      [[ -z $ERR ]] || say "$ERR"
      die "the run does not fit $topology; nothing was created or started. Add --force to go on anyway."
      ;;
    *) [[ -z $ERR ]] || say "$ERR"; die "preflight refused the run (exit code $status); nothing was created or started. Add --force to go on anyway." ;;
  esac
}
