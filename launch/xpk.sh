#!/usr/bin/env bash
# Runs on a GKE cluster through xpk (pip install xpk), over one slice or several. The script neither creates nor deletes a
# cluster; see `xpk cluster create --help`.
#
#   xpk.sh image  --image us-docker.pkg.dev/P/REPO/mtp_jax       build and push the checked-out commit, tagged with it
#   xpk.sh train  --cluster C --tpu-type v5litepod-16 [--slices 2] --image I --run R --store gs://BUCKET/FOLDER --config FILE
#                 [--restarts 50] [--preset P] [override...]
#   xpk.sh logs   --cluster C --run R [--lines 100]
#   xpk.sh status --cluster C --run R
#   xpk.sh fetch  --run R --store gs://BUCKET/FOLDER [--to FOLDER]
#   xpk.sh stop | delete  --cluster C --run R
#
# A run is a workload of the same name. When a slice is lost, the run restarts and resumes by itself; after a delete, the same
# train command resumes it. stop is delete: the pods get SIGTERM and two minutes for a checkpoint.
# --zone Z, --project P, --force (does not check that it fits), --dry-run: as for tpu_vm.sh.

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
opt_cluster='' opt_tpu_type='' opt_slices=1 opt_image='' opt_restarts=50 opt_zone='' opt_project='' opt_force=false
# shellcheck disable=SC2034
opt_run='' opt_store='' opt_config='' opt_preset=none opt_lines=100 opt_to=''
verb=${1:---help}
shift || true
case $verb in
  image | train | logs | status | fetch | stop | delete) parse "$@" ;;
  -h | --help) usage; exit 0 ;;
  *) die "unknown verb $verb; see: $0 --help" ;;
esac
check_whole lines "$opt_lines"
check_whole slices "$opt_slices"
check_whole restarts "$opt_restarts"

place() {
  find_place
  need_program xpk "run: pip install xpk"
  WHERE=(--cluster="$opt_cluster" "${PLACE[@]}")
  DELETE=(xpk workload delete --workload="$opt_run" "${WHERE[@]}" --force)
}

image() {
  need image
  need_program docker "see https://docs.docker.com/get-docker/"
  find_commit true # an image holds the commit itself, so it need not be pushed
  run 3600 docker build --file "$ROOT/launch/Dockerfile" --tag "$opt_image:${COMMIT:0:12}" "$ROOT" || fail "the image was not built; see above."
  run 3600 docker push "$opt_image:${COMMIT:0:12}" || fail "the image was not pushed; run: gcloud auth configure-docker ${opt_image%%/*}"
  say "image: $opt_image:${COMMIT:0:12}"
}

train() {
  local command
  need tpu-type image
  check_run
  find_topology "$opt_tpu_type"
  place
  check_bucket "$opt_store"
  preflight "$TOPOLOGY" "$opt_config" ${ARGS[@]+"${ARGS[@]}"}
  command=$(quoted python -m mtp_jax.train "${TRAIN[@]}")
  if [[ $opt_preset != none ]]; then command=". launch/env.sh $opt_preset && $command"; fi
  exists "workload $opt_run on cluster $opt_cluster" "$(quoted "${DELETE[@]}")"
  CREATING=true
  # exec, so that SIGTERM reaches Python: a shell would not pass it on.
  run 1800 xpk workload create --workload="$opt_run" "${WHERE[@]}" --tpu-type="$opt_tpu_type" --num-slices="$opt_slices" \
    --docker-image="$opt_image" --max-restarts="$opt_restarts" --termination-grace-period-seconds=120 \
    --command="${command/python -m/exec python -m}" || fail "workload $opt_run was not created; see above."
  CREATING=false
  say "watch it with: $(quoted "$0" status --cluster "$opt_cluster" --run "$opt_run")"
}

if [[ $verb == image ]]; then
  image
  exit
fi
need run
check_name run "$opt_run"
if [[ $verb == fetch ]]; then
  need store
  [[ $opt_store == gs://* ]] || die "--store $opt_store: should be a bucket, gs://NAME/FOLDER."
  need_program gcloud "see https://cloud.google.com/sdk/docs/install, then run: gcloud auth login"
  fetch_results
  exit
fi
need cluster
case $verb in
  train) train ;;
  status)
    place
    run 120 xpk workload list --filter-by-job="^$opt_run\$" "${WHERE[@]}" || fail "the workloads of $opt_cluster cannot be listed; see above."
    ;;
  logs)
    place
    need_program kubectl "run: gcloud components install kubectl"
    run 120 gcloud container clusters get-credentials "$opt_cluster" --location="$REGION" --project="$PROJECT" || fail "no access to cluster $opt_cluster; see above."
    run 120 kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$opt_run" --all-containers --prefix --tail="$opt_lines" --max-log-requests=64 ||
      fail "no logs; see above, and: $(quoted "$0" status --cluster "$opt_cluster" --run "$opt_run")"
    ;;
  stop | delete)
    place
    exists "workload $opt_run on cluster $opt_cluster" "$(quoted "${DELETE[@]}")"
    CREATING=true
    run 600 "${DELETE[@]}" || fail "workload $opt_run was not deleted; see above."
    ;;
esac
