# shellcheck shell=bash
# Verbs that are the same wherever machines can be reached: setup, train, logs, status, fetch, stop.
# A script that sources this file defines
#   on_workers SECONDS COMMAND    run a shell command on all machines, with its output
#   ask_workers SECONDS COMMAND   the same, with the output in OUT
#   send FILE NAME                copy a file into the home folder of all machines
#   copy_back NAME FOLDER         copy a folder from the first machine's home folder
# and declares opt_run, opt_store, opt_config, opt_preset, opt_extras, opt_upload, opt_secrets, opt_lines, opt_grace, opt_to.

# shellcheck disable=SC2154 # declared there
BACKOFF=${MTP_JAX_BACKOFF:-15} # seconds before the second attempt; each further one waits twice as long

nap() { # seconds; unlike sleep it ends at once when the script is signalled
  sleep "$1" &
  CHILD=$!
  wait "$CHILD" || true
  CHILD=''
}

backoff() { # how many attempts failed
  local seconds=$BACKOFF i
  for ((i = 1; i < $1 && seconds < 600; i++)); do seconds=$((seconds * 2)); done
  nap "$((seconds < 600 ? seconds : 600))"
}

# What setup runs while a machine has nothing of this repository yet.
bootstrap() {
  local busy="for lock in ~/mtp_jax_runs/*/lock; do [ ! -e \"\$lock\" ] || flock --nonblock \"\$lock\" true || { echo \"error: a run is under way here (\$lock); stop it first\" >&2; exit 1; }; done"
  local fetch
  if [[ $opt_upload == true ]]; then
    fetch="rm -rf ~/mtp_jax && mkdir -p ~/mtp_jax && tar -xzf ~/mtp_jax.tar.gz -C ~/mtp_jax"
  else
    fetch="{ [ -d ~/mtp_jax/.git ] || git clone --quiet --no-checkout $(quoted "$REMOTE") ~/mtp_jax; } && git -C ~/mtp_jax fetch --quiet origin && git -C ~/mtp_jax checkout --quiet --force --detach $COMMIT"
  fi
  printf '%s' "$busy; $fetch && bash ~/mtp_jax/launch/worker.sh install $(quoted "$opt_extras")"
}

worker() { printf '%s' "bash ~/mtp_jax/launch/worker.sh $(quoted "$@")"; }

setup_workers() { # once; the caller has called find_commit
  if [[ $opt_upload == true ]]; then
    scratch
    run 60 git -C "$ROOT" archive --format=tar.gz --output="$SCRATCH/mtp_jax.tar.gz" "$COMMIT" || return 1
    send "$SCRATCH/mtp_jax.tar.gz" mtp_jax.tar.gz || return 1
  fi
  if [[ -n $opt_secrets ]]; then
    on_workers 120 'umask 077 && mkdir -p ~/.config/mtp_jax' || return 1
    send "$opt_secrets" .config/mtp_jax/secrets || return 1
  fi
  on_workers 2400 "$(bootstrap)"
}

check_secrets() {
  [[ -z $opt_secrets || -r $opt_secrets ]] || die "--secrets $opt_secrets: there is no such file; it should hold lines like HF_TOKEN=..."
}

# Sets TRAIN, the arguments of mtp_jax.train. The run's folder and its compiled programs have fixed names in the store, so
# that the same command resumes it.
arguments() {
  TRAIN=(--config "$opt_config" "output_dir=${opt_store%/}/$opt_run" "compilation_cache=${opt_store%/}/compiled" ${ARGS[@]+"${ARGS[@]}"})
}

check_run() {
  local argument
  need run config store
  check_name run "$opt_run"
  [[ $opt_store == gs://?* || $opt_store == /* ]] ||
    die "--store $opt_store: should be a bucket (gs://NAME/FOLDER), or an absolute path that all machines share."
  for argument in ${ARGS[@]+"${ARGS[@]}"}; do
    [[ $argument == *=* ]] || die "$argument: should be an override such as train.steps=100."
    [[ $argument != output_dir=* ]] || die "$argument: the run's folder is --store and --run together."
  done
  check_config "$opt_config"
  [[ $opt_preset == none ]] || (. "$ROOT/launch/env.sh" "$opt_preset") >/dev/null
  arguments
}

start_workers() { on_workers 300 "$(worker train "$opt_run" "$opt_preset" "${TRAIN[@]}")"; }

fetch_results() {
  local source=${opt_store%/}/$opt_run to=${opt_to:-runs/$opt_run}
  run 60 mkdir -p "$to"
  if [[ $source == gs://* ]]; then
    run 3600 gcloud storage rsync --recursive --exclude='^(checkpoints|compiled)/.*' "$source" "$to"
  else
    copy_back "$source" "$to"
  fi
  say "results are in $to"
}

setup_with_retries() {
  local tries=0
  # The first connections to a new machine often fail, while its keys are distributed.
  until setup_workers; do
    tries=$((tries + 1))
    ((tries < 4)) || fail "setup failed $tries times; see above."
    say "setup failed; trying again."
    backoff "$tries"
  done
}

pod_verb() { # verb; the machines must be known
  case $1 in
    setup) setup_with_retries ;;
    train)
      start_workers || fail "training did not start on all machines; see above, and run: $0 status"
      say "watch it with: $0 logs, $0 status"
      ;;
    logs) on_workers 120 "$(worker logs "$opt_run" "$opt_lines")" ;;
    status) on_workers 120 "$(worker status "$opt_run")" ;;
    fetch) fetch_results ;;
    stop) on_workers $((opt_grace + 60)) "$(worker stop "$opt_run" "$opt_grace")" ;;
  esac
}
