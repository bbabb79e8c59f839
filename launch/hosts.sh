# shellcheck shell=bash
# The functions that pod.sh needs, for machines that have one connection each, all used at the same time. A script that sources
# this file sets HOSTS and defines remote, remote_copy and remote_back, which set REMOTE_WORDS to the command for one machine.
# shellcheck disable=SC2154

# Runs the command that a function makes for each machine; prints the output in the order of the machines.
on_each() { # seconds, function, argument...
  local seconds=$1 make=$2 host i status=0 started=$SECONDS pids=()
  shift 2
  if [[ $opt_dry_run == true ]]; then
    for host in "${HOSTS[@]}"; do
      "$make" "$host" "$@"
      printf '%s\n' "$(quoted "${REMOTE_WORDS[@]}")"
    done
    return
  fi
  scratch
  for ((i = 0; i < ${#HOSTS[@]}; i++)); do
    "$make" "${HOSTS[i]}" "$@"
    "${REMOTE_WORDS[@]}" </dev/null >"$SCRATCH/host$i" 2>"$SCRATCH/host$i.err" &
    pids+=($!)
  done
  for ((i = 0; i < ${#HOSTS[@]}; i++)); do
    while kill -0 "${pids[i]}" 2>/dev/null; do
      if ((SECONDS - started > seconds)); then
        kill -TERM "${pids[@]}" 2>/dev/null || true
        say "${HOSTS[i]}: no answer within $seconds seconds"
        break
      fi
      sleep "$TICK"
    done
    wait "${pids[i]}" || status=$?
    cat "$SCRATCH/host$i"
    if [[ -s $SCRATCH/host$i.err ]]; then sed "s/^/${HOSTS[i]}: /" "$SCRATCH/host$i.err" >&2; fi
  done
  return "$status"
}

plain_command() { remote "$1" "$2"; }

# JAX detects the coordinator and the number of processes only from a scheduler or the TPU's metadata.
numbered_command() { # host command
  local i
  for ((i = 0; i < ${#HOSTS[@]}; i++)); do
    if [[ ${HOSTS[i]} == "$1" ]]; then
      remote "$1" "JAX_COORDINATOR_ADDRESS=${HOSTS[0]##*@}:${opt_port:-8476} JAX_NUM_PROCESSES=${#HOSTS[@]} JAX_PROCESS_ID=$i $2"
    fi
  done
}

on_workers() { # seconds command
  if [[ $opt_explicit == true && ${#HOSTS[@]} -gt 1 && $2 == *'worker.sh train '* ]]; then
    on_each "$1" numbered_command "$2"
  else
    on_each "$1" plain_command "$2"
  fi
}

send() { on_each 600 remote_copy "$1" "$2"; }

copy_back() { # folder, to
  remote_back "${HOSTS[0]}" "$1" "$2"
  run 3600 "${REMOTE_WORDS[@]}"
}
