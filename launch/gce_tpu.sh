#!/usr/bin/env bash
# A TPU slice through Compute Engine, for v5p and later: a workload policy (the slice's shape), an instance template and a managed
# instance group of as many machines as the slice has hosts. The verbs are those of tpu_vm.sh.
#
#   gce_tpu.sh create --name N --accelerator-type v5p-32 [--spot | --reservation R] [--config FILE override...]
#   gce_tpu.sh setup  --name N [--upload] [--secrets FILE]
#   gce_tpu.sh train  --name N --accelerator-type v5p-32 --run R --store gs://BUCKET/FOLDER --config FILE [override...]
#   gce_tpu.sh logs | status | stop  --name N --run R
#   gce_tpu.sh fetch  --run R --store gs://BUCKET/FOLDER [--to FOLDER]
#   gce_tpu.sh delete --name N
#
# Types: v5p-N and tpu7x-N (N counts cores, two to a chip), v6e-N (N counts chips).
# --machine-type M, --image-family F  instead of the defaults; tpu7x has no default image: choose one of this list
#                    (gcloud compute images list --project=ubuntu-os-accelerator-images --filter=family~tpu)
# --explicit         tell every process the coordinator and its number, for images where JAX does not detect them
# --service-account A, --network N, --zone Z, --project P, --preset P, --force, --dry-run: as for tpu_vm.sh.
#
# The group does not replace a lost machine, because training cannot continue on part of a slice. After a preemption: delete,
# create, setup, and train with the same --run, which resumes.

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
# shellcheck source=launch/hosts.sh
. "$HERE/hosts.sh"
opt_name='' opt_zone='' opt_project='' opt_accelerator_type='' opt_machine_type='' opt_image_family='' opt_reservation=''
opt_network='' opt_service_account='' opt_spot=false opt_force=false opt_explicit=false
# shellcheck disable=SC2034
opt_run='' opt_store='' opt_config='' opt_preset=none opt_extras=tpu,gcs opt_upload=false opt_secrets='' opt_lines=100
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

check_accelerator() { # sets TOPOLOGY, SIZE, MACHINE and FAMILY
  local per_host=4
  need accelerator-type
  find_topology "$opt_accelerator_type"
  FAMILY=${opt_image_family:-ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}
  case $GENERATION in
    v5p) MACHINE=ct5p-hightpu-4t ;;
    v6e) MACHINE=ct6e-standard-4t; if ((CHIPS < 4)); then per_host=1 MACHINE=ct6e-standard-1t; fi ;;
    tpu7x)
      MACHINE=tpu7x-standard-4t FAMILY=$opt_image_family
      [[ -n $FAMILY ]] || die "--image-family is missing for $opt_accelerator_type; see: gcloud compute images list --project=ubuntu-os-accelerator-images --filter=family~tpu"
      ;;
    *) die "--accelerator-type $opt_accelerator_type: this script serves v5p-N, v6e-N and tpu7x-N; see launch/tpu_vm.sh." ;;
  esac
  MACHINE=${opt_machine_type:-$MACHINE} SIZE=$((CHIPS / per_host))
}

group() { call "$1" gcloud compute instance-groups managed "$2" "$opt_name" "${PLACE[@]}" "${@:3}"; }

# Three resources of the slice's name; each is mentioned as soon as it may exist.
mention_template() { exists "instance template $opt_name" "gcloud compute instance-templates delete $opt_name --project=$PROJECT --quiet"; }
mention_policy() { exists "workload policy $opt_name" "gcloud compute resource-policies delete $opt_name --region=$REGION --project=$PROJECT --quiet"; }
mention_group() { exists "TPU slice $opt_name in $ZONE" "gcloud compute instance-groups managed delete $opt_name ${PLACE[*]} --quiet"; }

step() { # what, command...
  local what=$1
  shift
  call 900 "$@" || {
    [[ $(kind_of_error "$ERR") != exists ]] || fail "$what $opt_name exists already; delete it first: $(quoted "$0" delete --name "$opt_name" "${PLACE[@]}")"
    fail "$what $opt_name was not created: $(explain "$ERR")"
  }
}

create() {
  local template
  [[ $opt_spot == false || -z $opt_reservation ]] || die "--spot and --reservation exclude each other."
  check_accelerator
  [[ -z $opt_config ]] || check_config "$opt_config"
  find_place
  if [[ -n $opt_config ]]; then
    preflight "$TOPOLOGY" "$opt_config" ${ARGS[@]+"${ARGS[@]}"}
  else
    say "note: no --config, so it is not checked whether a run fits $TOPOLOGY."
  fi
  CREATING=true
  template=(gcloud compute instance-templates create "$opt_name" --project="$PROJECT" --machine-type="$MACHINE"
    --image-family="$FAMILY" --image-project=ubuntu-os-accelerator-images --maintenance-policy=TERMINATE
    --scopes=cloud-platform --boot-disk-size=200GB)
  if [[ $opt_spot == true ]]; then template+=(--provisioning-model=SPOT --instance-termination-action=DELETE); fi
  if [[ -n $opt_reservation ]]; then
    template+=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE --reservation-affinity=specific --reservation="$opt_reservation")
  fi
  if [[ -n $opt_network ]]; then template+=(--network="$opt_network"); fi
  if [[ -n $opt_service_account ]]; then template+=(--service-account="$opt_service_account"); fi
  mention_template
  step "instance template" "${template[@]}" --quiet
  local words=(gcloud compute instance-groups managed create "$opt_name" "${PLACE[@]}" --template="$opt_name" --size="$SIZE"
    --default-action-on-vm-failure=do-nothing)
  if ((SIZE > 1)); then
    mention_policy
    step "workload policy" gcloud compute resource-policies create workload-policy "$opt_name" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$SHAPE" --region="$REGION" --project="$PROJECT" --quiet
    words+=(--workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$opt_name")
  fi
  mention_group
  step "instance group" "${words[@]}" --quiet
  group 1800 wait-until --stable --timeout=1700 || fail "the machines of $opt_name did not start: $(explain "$ERR")"
  CREATING=false
  [[ $opt_dry_run == true ]] || say "$opt_name is up with $SIZE machines; it costs money until you run: $(quoted "$0" delete --name "$opt_name" "${PLACE[@]}")"
}

delete() { # the group first: it uses the others
  local i kept=()
  mention_group
  mention_policy
  mention_template
  CREATING=true
  for ((i = 0; i < ${#EXISTING[@]}; i += 2)); do
    # shellcheck disable=SC2086 # our own words, without blanks
    if call 900 ${EXISTING[i + 1]}; then
      [[ $opt_dry_run == true ]] || say "deleted: ${EXISTING[i]}"
    elif [[ $(kind_of_error "$ERR") != absent ]]; then
      say "${EXISTING[i]} was not deleted: $(explain "$ERR")"
      kept+=("${EXISTING[i]}" "${EXISTING[i + 1]}")
    fi
  done
  EXISTING=(${kept[@]+"${kept[@]}"})
  ((${#EXISTING[@]} == 0)) || fail "not everything was deleted."
}

find_hosts() { # the machines of the group, in the order of their names
  group 60 list-instances --sort-by=name --format='value(instance.basename())' ||
    fail "the machines of $opt_name cannot be listed: $(explain "$ERR")"
  if [[ $opt_dry_run == true ]]; then
    HOSTS=("$opt_name-machine")
  else
    # shellcheck disable=SC2206 # names have no blanks
    HOSTS=($OUT)
    ((${#HOSTS[@]})) || fail "there is no machine in $opt_name; run: $(quoted "$0" create --name "$opt_name" "${PLACE[@]}" --accelerator-type TYPE)"
  fi
}

remote() { REMOTE_WORDS=(gcloud compute ssh "$1" "${PLACE[@]}" --quiet --command="$2"); }
remote_copy() { REMOTE_WORDS=(gcloud compute scp "$2" "$1:$3" "${PLACE[@]}" --quiet); }
remote_back() { REMOTE_WORDS=(gcloud compute scp "$1:$2" "$3" "${PLACE[@]}" --recurse --quiet); }

if [[ $verb == fetch && $opt_store == gs://* ]]; then
  need run store
  need_program gcloud "see https://cloud.google.com/sdk/docs/install, then run: gcloud auth login"
  pod_verb fetch
  exit
fi
need name
check_name name "$opt_name"
case $verb in
  create) create ;;
  delete) find_place && delete ;;
  *)
    if [[ $verb != setup ]]; then
      need run
      check_name run "$opt_run"
    fi
    if [[ $verb == train ]]; then
      check_accelerator
      check_run
    fi
    if [[ $verb == setup ]]; then
      check_secrets
      find_commit "$opt_upload"
    fi
    find_place
    find_hosts
    mention_group
    if [[ $verb == train ]]; then
      check_bucket "$opt_store"
      preflight "$TOPOLOGY" "$opt_config" ${ARGS[@]+"${ARGS[@]}"}
    fi
    pod_verb "$verb"
    ;;
esac
