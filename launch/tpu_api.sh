# shellcheck shell=bash
# TPU VMs through the Cloud TPU API; shared by tpu_vm.sh and tpu_babysit.sh.

# shellcheck disable=SC2154,SC2034 # declared by the scripts that source this file, and used there
OWNER_LABEL=mtp_jax_babysit # names the run that tpu_babysit.sh created a slice for; it deletes no other slice

delete_words() { # the command that deletes the slice
  if [[ $opt_queued == true ]]; then
    DELETE=(gcloud compute tpus queued-resources delete "$opt_name" "${PLACE[@]}" --force --quiet)
  else
    DELETE=(gcloud compute tpus tpu-vm delete "$opt_name" "${PLACE[@]}" --quiet)
  fi
}

mention() { # from here on an interruption reports that the slice may exist
  delete_words
  exists "TPU slice $opt_name in $ZONE" "$(quoted "${DELETE[@]}")"
}

# Sets STATE (absent, unknown or the API's), TYPE, WORKERS and OWNER of the TPU VM.
describe_tpu() {
  STATE=unknown TYPE='' WORKERS=0 OWNER=''
  if call 60 gcloud compute tpus tpu-vm describe "$opt_name" "${PLACE[@]}" \
    --format="value[separator='|'](state,acceleratorType.basename(),networkEndpoints.len(),labels.$OWNER_LABEL)"; then
    IFS='|' read -r STATE TYPE WORKERS OWNER <<<"$OUT" || true
  elif [[ $(kind_of_error "$ERR") == absent ]]; then
    STATE=absent
  fi
  STATE=${STATE:-unknown} WORKERS=${WORKERS:-1}
}

# Sets QUEUE_STATE and QUEUE_OWNER of the queued resource.
describe_queued() {
  QUEUE_STATE=unknown QUEUE_OWNER=''
  if call 60 gcloud compute tpus queued-resources describe "$opt_name" "${PLACE[@]}" \
    --format="value[separator='|'](state.state,tpu.nodeSpec[0].node.labels.$OWNER_LABEL)"; then
    IFS='|' read -r QUEUE_STATE QUEUE_OWNER <<<"$OUT" || true
  elif [[ $(kind_of_error "$ERR") == absent ]]; then
    QUEUE_STATE=absent
  fi
  QUEUE_STATE=${QUEUE_STATE:-unknown}
}

# Requests the slice, whose name must be free. Returns gcloud's exit code, with its message in ERR.
create_slice() { # label or nothing
  local words=()
  if [[ $opt_queued == true ]]; then
    words=(gcloud compute tpus queued-resources create "$opt_name" "${PLACE[@]}" --node-id="$opt_name"
      --accelerator-type="$opt_accelerator_type" --runtime-version="$RUNTIME")
  else
    words=(gcloud compute tpus tpu-vm create "$opt_name" "${PLACE[@]}"
      --accelerator-type="$opt_accelerator_type" --version="$RUNTIME")
  fi
  if [[ $opt_spot == true ]]; then words+=(--spot); fi
  if [[ $opt_reserved == true ]]; then words+=(--reserved); fi
  if [[ -n $opt_network ]]; then words+=(--network="$opt_network"); fi
  if [[ -n $opt_service_account ]]; then words+=(--service-account="$opt_service_account"); fi
  if [[ -n $1 ]]; then words+=(--labels="$OWNER_LABEL=$1"); fi
  call "$opt_create_timeout" "${words[@]}" --quiet
}

check_slice_options() {
  need name
  check_name name "$opt_name"
  check_whole create-timeout "$opt_create_timeout"
}

check_accelerator() { # sets TOPOLOGY and RUNTIME
  need accelerator-type
  find_topology "$opt_accelerator_type"
  case $GENERATION in
    tpu7x) die "--accelerator-type $opt_accelerator_type: the Cloud TPU API serves v2 to v6e; see launch/gce_tpu.sh and launch/xpk.sh." ;;
  esac
  RUNTIME=${opt_runtime_version:-$RUNTIME}
  [[ $opt_spot == false || $opt_reserved == false ]] || die "--spot and --reserved exclude each other."
}

on_workers() { # seconds command
  run "$1" gcloud compute tpus tpu-vm ssh "$opt_name" "${PLACE[@]}" --worker=all --quiet --command="$2"
}

ask_workers() { # seconds command
  call "$1" gcloud compute tpus tpu-vm ssh "$opt_name" "${PLACE[@]}" --worker=all --quiet --command="$2"
}

send() { # file name
  run 600 gcloud compute tpus tpu-vm scp "$1" "$opt_name:$2" "${PLACE[@]}" --worker=all --quiet
}

copy_back() { # folder, to
  run 3600 gcloud compute tpus tpu-vm scp "$opt_name:$1" "$2" "${PLACE[@]}" --worker=0 --recurse --quiet
}
