#!/usr/bin/env bash
# GPU machines that you reach by ssh, one or several, without a scheduler (with one: slurm.sbatch, skypilot.yaml).
#
#   gpu.sh setup  --hosts me@a,me@b [--upload] [--secrets FILE] [--extras cuda,gcs]
#   gpu.sh train  --hosts me@a,me@b --run R --store gs://BUCKET/FOLDER|/shared/folder --config FILE [override...]
#   gpu.sh logs | status | stop  --hosts me@a,me@b --run R
#   gpu.sh fetch  --hosts me@a,me@b --run R --store S [--to FOLDER]
#
# One process per machine, over all of its GPUs. The first machine coordinates: the others must reach it by the name given
# here, on --port 8476. The same train command resumes a run that has ended. The script creates no machine, so there is
# nothing to delete; stop ends a run.
# --preset P, --lines N, --grace SECONDS, --dry-run: as for tpu_vm.sh.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
. "$HERE/lib.sh"
# shellcheck source=launch/gcloud.sh
. "$HERE/gcloud.sh"
# shellcheck source=launch/pod.sh
. "$HERE/pod.sh"
# shellcheck source=launch/hosts.sh
. "$HERE/hosts.sh"
# shellcheck disable=SC2034
opt_hosts='' opt_port=8476 opt_explicit=true
# shellcheck disable=SC2034
opt_run='' opt_store='' opt_config='' opt_preset=none opt_extras=cuda,gcs opt_upload=false opt_secrets='' opt_lines=100
opt_grace=300 opt_to=''
verb=${1:---help}
shift || true
case $verb in
  setup | train | logs | status | fetch | stop) parse "$@" ;;
  -h | --help) usage; exit 0 ;;
  *) die "unknown verb $verb; see: $0 --help" ;;
esac
check_whole lines "$opt_lines"
check_whole grace "$opt_grace"
check_whole port "$opt_port"
need hosts
IFS=, read -r -a HOSTS <<<"$opt_hosts"
for host in "${HOSTS[@]}"; do
  # A name that begins with a hyphen would be an option of ssh.
  [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ ]] || die "--hosts $opt_hosts: should be names like me@host1,me@host2."
done

remote() { REMOTE_WORDS=(ssh -o BatchMode=yes -o ConnectTimeout=30 "$1" "$2"); }
remote_copy() { REMOTE_WORDS=(scp -q -o BatchMode=yes -o ConnectTimeout=30 "$2" "$1:$3"); }
remote_back() { REMOTE_WORDS=(scp -q -r -o BatchMode=yes -o ConnectTimeout=30 "$1:$2" "$3"); }

need_program ssh "install OpenSSH."
if [[ $verb != setup ]]; then
  need run
  check_name run "$opt_run"
fi
case $verb in
  train) check_run ;;
  fetch) need store ;;
  setup)
    check_secrets
    find_commit "$opt_upload"
    ;;
esac
exists "what was started on $opt_hosts (run ${opt_run:-none})" "$(quoted "$0" stop --hosts "$opt_hosts" --run "${opt_run:-RUN}")"
pod_verb "$verb"
