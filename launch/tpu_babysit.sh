#!/usr/bin/env bash
# Trains to the end on a TPU slice that may be preempted at any time: creates the slice, installs, starts training and watches
# it, and creates the slice again after a preemption. The run keeps its name, so it resumes from its last checkpoint. The script
# ends by itself.
#
#   tpu_babysit.sh --name N --accelerator-type v5litepod-16 --run R --store gs://BUCKET/FOLDER --config FILE [override...]
#
# --spot, --reserved, --queued, --zone, --project, --runtime-version, --network, --service-account, --preset, --upload,
# --secrets, --force, --dry-run: as for tpu_vm.sh.
# --poll 60              seconds between two checks
# --recreations 50       how often the slice may be created
# --failures 8           how many creations may fail in a row; the wait doubles each time
# --crashes 3            how often training may end with an error that is not a preemption
# --unreachable 5        how many connections may fail in a row before the slice is given up
# --create-timeout 1800  seconds for one creation; --queue-timeout 86400: for waiting in the queue
# --deadline 1209600     seconds for everything
# --keep                 keep the slice when training is done
#
# It deletes only slices with its own label (mtp_jax_babysit=R): it uses a slice that you created, but never deletes it. You may
# interrupt it at any time: training goes on, and the same command watches it again. Exit code 0: done; 1: given up; 2: wrong
# input.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$HERE/lib.sh"
# shellcheck source=launch/gcloud.sh
. "$HERE/gcloud.sh"
# shellcheck source=launch/topology.sh
. "$HERE/topology.sh"
# shellcheck source=launch/pod.sh
. "$HERE/pod.sh"
# shellcheck source=launch/tpu_api.sh
. "$HERE/tpu_api.sh"
# shellcheck disable=SC2034
opt_name='' opt_zone='' opt_project='' opt_accelerator_type='' opt_runtime_version='' opt_network='' opt_service_account=''
opt_spot=false opt_reserved=false opt_queued=false opt_force=false opt_create_timeout=1800 opt_queue_timeout=86400
# shellcheck disable=SC2034
opt_run='' opt_store='' opt_config='' opt_preset=none opt_extras=tpu,gcs opt_upload=false opt_secrets='' opt_lines=40
# shellcheck disable=SC2034
opt_grace=120 opt_to=''
opt_poll=60 opt_recreations=50 opt_failures=8 opt_crashes=3 opt_unreachable=5 opt_deadline=1209600 opt_keep=false
parse "$@"

made=0 failures=0 crashes=0 restarts=0 unreachable=0 pending=$SECONDS

note() { say "$(date +%H:%M:%S) $*"; }

give_up() { # why; the exit trap mentions what exists
  look
  if [[ $PHASE == absent ]]; then EXISTING=(); fi
  CREATING=true
  fail "$*"
}

# Sets PHASE: absent, waiting, ready, lost (for instance preempted) or unknown; and WHOSE, the run in the slice's label.
look() {
  local state
  if [[ $opt_queued == true ]]; then
    describe_queued
    WHOSE=$QUEUE_OWNER state=$QUEUE_STATE
    case $state in
      ACTIVE) ;;
      absent) PHASE=absent && return ;;
      FAILED | SUSPENDED) PHASE=lost SEEN=$state && return ;;
      unknown) PHASE=unknown && return ;;
      *) PHASE=waiting SEEN=$state && return ;;
    esac
    describe_tpu
    if [[ $STATE == absent ]]; then STATE=PREEMPTED; fi # the request remains, the machines are gone
  else
    describe_tpu
    WHOSE=$OWNER
  fi
  SEEN=$STATE
  case $STATE in
    absent) PHASE=absent ;;
    READY) PHASE=ready ;;
    unknown) PHASE=unknown ;;
    PREEMPTED | TERMINATED | STOPPED | HIDDEN | HIDING | UNHIDING) PHASE=lost ;;
    *) PHASE=waiting ;; # CREATING, STARTING, RESTARTING, REPAIRING, STOPPING, DELETING
  esac
}

create_again() {
  local limit=$opt_recreations
  ((made < limit)) || give_up "the slice was created $made times (--recreations); given up."
  made=$((made + 1)) pending=$SECONDS
  note "creating $opt_name ($opt_accelerator_type), attempt $made of at most $limit"
  EXISTING=()
  mention
  if create_slice "$opt_run"; then
    failures=0
    return
  fi
  failures=$((failures + 1))
  case $(kind_of_error "$ERR") in
    login | permission | invalid) give_up "$opt_name cannot be created: $(explain "$ERR")" ;;
  esac
  note "creation failed: $(explain "$ERR")"
  ((failures < opt_failures)) || give_up "$failures creations in a row failed (--failures); given up."
  backoff "$failures"
}

delete_own() { # why
  # Checked again right before the deletion: a slice without this run's label is not ours.
  look
  [[ $PHASE != absent ]] || return 0
  [[ $WHOSE == "$opt_run" ]] ||
    give_up "$opt_name ($1) was not created by this script for run $opt_run and is left alone; delete it yourself and run this again."
  note "deleting $opt_name: $1"
  delete_words
  call 900 "${DELETE[@]}" || note "deletion failed: $(explain "$ERR")"
}

start_over() { # why
  note "$1"
  if ! setup_workers || ! start_workers; then crashed "setup or start failed"; fi
}

crashed() { # why
  crashes=$((crashes + 1))
  note "$1 ($crashes of at most $opt_crashes)"
  if ((crashes >= opt_crashes)); then
    on_workers 120 "$(worker logs "$opt_run" "$opt_lines")" || true
    if [[ $opt_keep == false && $WHOSE == "$opt_run" ]]; then delete_own "given up"; fi
    give_up "run $opt_run failed $crashes times (--crashes); its last lines are above."
  fi
  backoff "$crashes"
}

# Asks the workers for the state of the run; returns 0 when it is done.
watch_run() {
  local total running done_ok wrong codes asked=0
  ask_workers 120 "$(worker status "$opt_run") 2>/dev/null || echo mtp_jax-status state=absent" || asked=$?
  total=$(count 'mtp_jax-status ')
  # With --worker=all gcloud may succeed although a worker did not answer.
  if ((asked || total < WORKERS)); then
    unreachable=$((unreachable + 1))
    note "no connection to the workers ($unreachable of at most $opt_unreachable): $(explain "$ERR")"
    if ((unreachable >= opt_unreachable)); then
      unreachable=0
      delete_own "its workers cannot be reached"
    fi
    return 1
  fi
  unreachable=0
  running=$(count ' state=running') done_ok=$(count ' state=exited code=0$')
  wrong=$(count ' code=2$') codes=$(grep -o 'state=[a-z]* code=[0-9-]*' <<<"$OUT" | sort | uniq -c | tr -s ' \n' ' ' || true)
  if ((wrong)); then
    on_workers 120 "$(worker logs "$opt_run" "$opt_lines")" || true
    if [[ $opt_keep == false && $WHOSE == "$opt_run" ]]; then delete_own "wrong input"; fi
    give_up "run $opt_run ended with exit code 2, wrong input: see the lines above; starting it again would not help."
  fi
  if ((done_ok == total)); then return 0; fi
  if (($(count ' state=absent') == total)); then
    start_over "starting run $opt_run"
  elif ((running == total || (running > 0 && running + done_ok == total))); then
    note "run $opt_run is under way on $running of $total workers"
  else
    # The others would wait for the worker that ended; none can go on without it.
    on_workers $((opt_grace + 60)) "$(worker stop "$opt_run" "$opt_grace")" || true
    restarts=$((restarts + 1))
    ((restarts <= opt_recreations)) || give_up "run $opt_run was restarted $restarts times; given up."
    # 143: it was asked to end; 75: one of its processes was lost.
    if (($(count ' code=143$') + $(count ' code=75$') + $(count ' state=lost') + done_ok + running == total)); then
      start_over "run $opt_run was interrupted ($codes); resuming"
    else
      crashed "run $opt_run ended:$codes"
      start_workers || true
    fi
  fi
  return 1
}

count() { grep -c -- "$1" <<<"$OUT" || true; }

check_slice_options
check_run
for option in poll recreations failures crashes unreachable queue-timeout deadline; do
  variable=opt_${option//-/_}
  check_whole "$option" "${!variable}"
done
check_accelerator
check_secrets
find_commit "$opt_upload"
find_place
check_bucket "$opt_store"
preflight "$TOPOLOGY" "$opt_config" ${ARGS[@]+"${ARGS[@]}"}
if [[ $opt_dry_run == true ]]; then
  create_slice "$opt_run" && setup_workers && start_workers
  ask_workers 120 "$(worker status "$opt_run")"
  delete_words
  quoted "${DELETE[@]}"
  echo
  exit
fi

while :; do
  ((SECONDS < opt_deadline)) || give_up "not done after $opt_deadline seconds (--deadline); given up."
  look
  if [[ $PHASE != absent && ${#EXISTING[@]} -eq 0 ]]; then mention; fi
  case $PHASE in
    absent) create_again && continue ;;
    lost)
      note "$opt_name is $SEEN"
      delete_own "$SEEN"
      ;;
    waiting)
      limit=$opt_create_timeout
      if [[ $opt_queued == true ]]; then limit=$opt_queue_timeout; fi
      note "$opt_name is $SEEN"
      if ((SECONDS - pending > limit)); then
        delete_own "still $SEEN after $limit seconds"
        pending=$SECONDS
      fi
      ;;
    unknown)
      unreachable=$((unreachable + 1))
      note "$opt_name cannot be looked up: $(explain "$ERR")"
      case $(kind_of_error "$ERR") in
        login | permission | invalid) give_up "$(explain "$ERR")" ;;
      esac
      ((unreachable < opt_unreachable)) || give_up "$unreachable checks in a row failed; given up."
      ;;
    ready)
      pending=$SECONDS
      if watch_run; then break; fi
      ;;
  esac
  nap "$opt_poll"
done
note "run $opt_run is done: $(quoted "$HERE/tpu_vm.sh" fetch --run "$opt_run" --store "$opt_store")"
if [[ $opt_keep == false ]]; then
  if [[ $WHOSE == "$opt_run" ]]; then
    delete_own "done"
    look
    [[ $PHASE == absent ]] || { CREATING=true; fail "training is done, but $opt_name is still there ($SEEN)."; }
  else
    say "$opt_name was not created by this script and is left alone; it costs money until you run: $(delete_words; quoted "${DELETE[@]}")"
  fi
fi
