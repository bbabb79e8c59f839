#!/usr/bin/env bash
# Stands in for gcloud, kubectl, xpk, ssh, scp, srun, scontrol and docker. Records its words in $FAKE/calls, and does what
# the next line of $FAKE/next.KIND says, or else what a cloud in a good mood does. Where FAKE_UV names what stands in for
# uv, machines are folders, and what they are told by ssh is run, with variables that say to JAX which machine it is.
name=${0##*/}
# One write, because several may come at the same time.
printf -v record '\t%s' "$@"
printf '%s\n' "$name$record" >>"$FAKE/calls"

case "$name $*" in
  *'tpu-vm create'*) kind=create ;;
  *'queued-resources create'*) kind=create ;;
  *'tpu-vm describe'*) kind=describe ;;
  *'queued-resources describe'*) kind=queue ;;
  *'tpu-vm delete'* | *'queued-resources delete'*) kind=delete ;;
  *'worker.sh status '*) kind=status ;;
  *'worker.sh train '*) kind=train ;;
  *'worker.sh install '*) kind=setup ;;
  *'worker.sh stop '*) kind=stop ;;
  *'config get-value'*) kind=config ;;
  *'buckets describe'*) kind=bucket ;;
  *'list-instances'*) kind=instances ;;
  *'instance-templates create'*) kind=template ;;
  *'resource-policies create'*) kind=policy ;;
  *'instance-groups managed create'*) kind=group ;;
  *) kind=$name ;;
esac

word=
if [[ -s $FAKE/next.$kind ]]; then
  mapfile -t lines <"$FAKE/next.$kind"
  word=${lines[0]}
  printf '%s\n' "${lines[@]:1}" >"$FAKE/next.$kind.part"
  if ((${#lines[@]} == 1)); then : >"$FAKE/next.$kind.part"; fi
  mv "$FAKE/next.$kind.part" "$FAKE/next.$kind"
fi

option() { # name: the value of --name=
  local pattern=" --$1=([^ ]*)"
  [[ " $words" =~ $pattern ]] && printf '%s' "${BASH_REMATCH[1]}"
}
words=$*
refuse() { echo "ERROR: (gcloud.$kind) $1" >&2; exit 1; }
make() { # state
  printf '%s|%s|%s|%s\n' "$1" "$(option accelerator-type)" "${FAKE_WORKERS:-2}" "$(option labels | cut -d= -f2)" >"$FAKE/tpu"
  if [[ $words == *queued-resources* ]]; then printf '%s|%s\n' ACTIVE "$(option labels | cut -d= -f2)" >"$FAKE/queue"; fi
}
boot() {
  for ((i = 0; i < ${FAKE_WORKERS:-2}; i++)); do
    mkdir -p "$FAKE/machine$i/.local/bin"
    cp "$FAKE_UV" "$FAKE/machine$i/.local/bin/uv"
  done
}
off() {
  for file in "$FAKE"/machine*/mtp_jax_runs/*/pid; do
    if [[ -e $file ]] && read -r _ _ _ _ group _ <"/proc/$(<"$file")/stat"; then kill -KILL -- "-$group"; fi
  done 2>/dev/null
  rm -rf "$FAKE"/machine*
}
tell() { # command
  local port=$((20000 + RANDOM % 20000)) code=0
  for ((i = 0; i < ${FAKE_WORKERS:-2}; i++)); do
    HOME=$FAKE/machine$i JAX_PROCESS_ID=$i JAX_NUM_PROCESSES=${FAKE_WORKERS:-2} \
      JAX_COORDINATOR_ADDRESS=localhost:$port bash -c "$1" || code=$?
  done
  exit "$code"
}
all() { for ((i = 0; i < ${FAKE_WORKERS:-2}; i++)); do echo "mtp_jax-status host=h$i run=r $1"; done; }

case $word in
  quota) refuse "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0 in zone us-central1-a." ;;
  capacity) refuse "There is no more capacity in the zone \"us-central1-a\"; you can try in another zone" ;;
  permission) refuse "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on resource" ;;
  login) refuse 'You do not currently have an active account selected. Please run: $ gcloud auth login' ;;
  invalid) refuse "INVALID_ARGUMENT: Accelerator type is not available in this zone" ;;
  absent-resource) refuse "NOT_FOUND: Resource was not found" ;;
  exists) refuse "ALREADY_EXISTS: Resource already exists" ;;
  fail) refuse "INTERNAL: something broke" ;;
  hang) exec sleep 60 ;;
  hang-made) make CREATING && exec sleep 60 ;;
  state:*) # of the slice, from now on
    IFS='|' read -r _ rest <"$FAKE/tpu"
    printf '%s|%s\n' "${word#state:}" "$rest" >"$FAKE/tpu"
    ;;
  queue:*)
    IFS='|' read -r _ rest <"$FAKE/queue"
    printf '%s|%s\n' "${word#queue:}" "$rest" >"$FAKE/queue"
    ;;
  preempted)
    IFS='|' read -r _ rest <"$FAKE/tpu"
    printf 'PREEMPTED|%s\n' "$rest" >"$FAKE/tpu"
    if [[ -e $FAKE/queue ]]; then
      IFS='|' read -r _ rest <"$FAKE/queue"
      printf 'SUSPENDED|%s\n' "$rest" >"$FAKE/queue"
      rm "$FAKE/tpu"
    fi
    refuse "[1] ssh: connect to host port 22: Connection timed out"
    ;;
  unreachable) refuse "[1] ssh: connect to host port 22: Connection timed out" ;;
  done) all 'state=exited code=0' && exit ;;
  running) all 'state=running code=-' && exit ;;
  absent) all 'state=absent code=-' && exit ;;
  code:*) all "state=exited code=${word#code:}" && exit ;;
  text:*) printf '%s\n' "${word#text:}" && exit ;;
esac

if [[ -n ${FAKE_UV:-} ]]; then
  for last; do :; done
  case $kind in
    create) boot ;;
    delete) off ;;
    *) if [[ $last == --command=* ]]; then tell "${last#--command=}"; fi ;;
  esac
fi
case $kind in
  create) make READY ;;
  describe) if [[ -e $FAKE/tpu ]]; then cat "$FAKE/tpu"; else refuse "NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found"; fi ;;
  queue) if [[ -e $FAKE/queue ]]; then cat "$FAKE/queue"; else refuse "NOT_FOUND: Resource was not found"; fi ;;
  delete) rm -f "$FAKE/tpu" "$FAKE/queue" ;;
  status) all 'state=running code=-' ;;
  instances) printf 'n-0001\nn-0002\n' ;;
esac
exit 0
