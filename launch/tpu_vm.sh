#!/usr/bin/env bash
# A TPU slice through the Cloud TPU API (v2 to v6e; v5p and later also through gce_tpu.sh): create it, train on it, fetch the
# results, delete it.
#
#   tpu_vm.sh create --name N --accelerator-type v5litepod-16 [--spot | --reserved] [--queued] [--config FILE override...]
#   tpu_vm.sh setup  --name N [--upload] [--secrets FILE]
#   tpu_vm.sh train  --name N --run R --store gs://BUCKET/FOLDER --config FILE [--preset P] [override...]
#   tpu_vm.sh logs   --name N --run R [--lines 100]
#   tpu_vm.sh status --name N [--run R] [--queued]
#   tpu_vm.sh fetch  --run R --store gs://BUCKET/FOLDER [--to FOLDER]
#   tpu_vm.sh stop   --name N --run R [--grace 300]
#   tpu_vm.sh delete --name N [--queued]
#
# create   creates a slice, or with --queued a request that waits for capacity. With --config it first checks that the run fits.
# setup    installs the commit that is checked out here on all workers: cloned from 'origin', or sent with --upload.
#          --secrets sends a file of lines like HF_TOKEN=..., which become environment variables of runs.
# train    starts mtp_jax.train on all workers, in the background; the same command resumes a run that has ended.
#          The run's folder is STORE/R. --preset names XLA flags of env.sh.
# stop     ends the run on all workers, with a checkpoint. The slice stays and costs money: see delete.
#
# Everywhere: --zone Z, --project P (else gcloud's own settings), --dry-run (only prints the commands), --force (does not
# check that the run fits), --runtime-version V, --network N, --service-account A, --create-timeout SECONDS.

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
# shellcheck disable=SC2034
opt_spot=false opt_reserved=false opt_queued=false opt_force=false opt_create_timeout=1800
# shellcheck disable=SC2034
opt_run='' opt_store='' opt_config='' opt_preset=none opt_extras=tpu,gcs opt_upload=false opt_secrets='' opt_lines=100
# shellcheck disable=SC2034
opt_grace=300 opt_to=''
verb=${1:---help}
shift || true
case $verb in
  create | setup | train | logs | status | fetch | stop | delete) parse "$@" ;;
  -h | --help) usage; exit 0 ;;
  *) die "unknown verb $verb; see: $0 --help" ;;
esac
check_whole lines "$opt_lines"
check_whole grace "$opt_grace"

create() {
  check_accelerator
  [[ -z $opt_config ]] || check_config "$opt_config"
  find_place
  if [[ -n $opt_config ]]; then
    preflight "$TOPOLOGY" "$opt_config" ${ARGS[@]+"${ARGS[@]}"}
  else
    say "note: no --config, so it is not checked whether a run fits $TOPOLOGY."
  fi
  describe_tpu
  [[ $STATE == absent || $opt_dry_run == true ]] ||
    fail "$opt_name exists already or cannot be looked up (state $STATE${ERR:+; $(explain "$ERR")})."
  mention
  CREATING=true
  if ! create_slice ''; then
    local reason=$ERR
    if [[ $opt_queued == true ]]; then describe_queued; else describe_tpu && QUEUE_STATE=$STATE; fi
    if [[ $QUEUE_STATE == absent ]]; then EXISTING=(); fi
    fail "$opt_name was not created: $(explain "$reason")"
  fi
  CREATING=false
  [[ $opt_dry_run == true ]] || say "$opt_name exists (or is queued); it costs money until you run: $(quoted "$0" delete --name "$opt_name" "${PLACE[@]}")"
}

delete() {
  find_place
  if [[ $opt_queued == false ]]; then # a slice that came from the queue is deleted with its request
    describe_queued
    if [[ $opt_dry_run == false && $QUEUE_STATE != absent && $QUEUE_STATE != unknown ]]; then opt_queued=true; fi
  fi
  mention
  CREATING=true # a failed deletion leaves something too
  run 900 "${DELETE[@]}" || fail "$opt_name was not deleted; see above."
}

status() {
  find_place
  if [[ $opt_queued == true ]]; then
    describe_queued
    [[ $opt_dry_run == true ]] || echo "request $opt_name: $QUEUE_STATE"
  fi
  describe_tpu
  [[ $opt_dry_run == true ]] || echo "slice $opt_name: $STATE $TYPE"
  if [[ $STATE == unknown && $opt_dry_run == false ]]; then fail "$(explain "$ERR")"; fi
  if [[ -n $opt_run && ($STATE == READY || $opt_dry_run == true) ]]; then pod_verb status; fi
}

if [[ $verb == fetch ]]; then
  need run store
  if [[ $opt_store != gs://* ]]; then
    need name
    find_place
  else
    need_program gcloud "see https://cloud.google.com/sdk/docs/install, then run: gcloud auth login"
  fi
  pod_verb fetch
  exit
fi
check_slice_options
case $verb in
  create | delete | status) "$verb" ;;
  *)
    if [[ $verb == logs || $verb == stop ]]; then
      need run
      check_name run "$opt_run"
    fi
    if [[ $verb == train ]]; then check_run; fi
    if [[ $verb == setup ]]; then
      check_secrets
      find_commit "$opt_upload"
    fi
    find_place
    describe_tpu
    if [[ $opt_dry_run == false ]]; then
      [[ $STATE != absent ]] || fail "there is no slice $opt_name in $ZONE; run: $(quoted "$0" create --name "$opt_name" "${PLACE[@]}" --accelerator-type TYPE)"
      [[ $STATE == READY ]] || fail "$opt_name is not ready (state $STATE${ERR:+; $(explain "$ERR")})."
      mention
    fi
    if [[ $verb == train ]]; then
      check_bucket "$opt_store"
      find_topology "${TYPE:-${opt_accelerator_type:-v5litepod-16}}"
      preflight "$TOPOLOGY" "$opt_config" ${ARGS[@]+"${ARGS[@]}"}
    fi
    pod_verb "$verb"
    ;;
esac
