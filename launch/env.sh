#!/usr/bin/env bash
# XLA flags by name, for your own shell or for --preset of the other scripts. None is set unless you ask for it: XLA's
# defaults change with every release, and a preset that helped one may slow down the next. Measure before and after.
#
#   . launch/env.sh NAME       append the preset to its variable in this shell, and export it
#   launch/env.sh --list       what each preset is for, and on which version it was checked
#   launch/env.sh --dry-run NAME
#
# "Checked" means that the compiler of that version accepts every flag (tests/launch/test_presets.py), not that it is faster.

# preset | variable | checked on | flags | what for
_mtp_jax_presets() {
  cat <<'TABLE'
tpu-v5e-overlap|LIBTPU_INIT_ARGS|jax 0.10.2, libtpu 0.0.52, v5e:2x2|--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true|v5e alone: gather weights while computing (the compiler refuses these flags for v6e)
tpu-multislice|LIBTPU_INIT_ARGS|jax 0.10.2, libtpu 0.0.52, v5e:2x2 v5p:2x2x1 v6e:2x2|--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true|several slices: reduce gradients over the data center network while computing
tpu-v6e-vmem-96m|LIBTPU_INIT_ARGS|jax 0.10.2, libtpu 0.0.52, v6e:2x2|--xla_tpu_scoped_vmem_limit_kib=98304|v6e alone: larger fusions in its larger vector memory
gpu-overlap|XLA_FLAGS|jax 0.10.2|--xla_gpu_enable_latency_hiding_scheduler=true|several GPUs: hide communication behind computation
TABLE
}

_mtp_jax_preset() { # name; print: only print it
  local name variable checked flags purpose
  while IFS='|' read -r name variable checked flags purpose; do
    if [[ $1 == --list ]]; then
      printf '%-18s %s\n%19schecked on %s\n%19s%s\n' "$name" "$purpose" '' "$checked" '' "$variable=$flags"
    elif [[ $1 == "$name" ]]; then
      if [[ ${2:-} == print ]]; then
        printf "export %s='%s'\n" "$variable" "$flags"
      else
        export "$variable=${!variable:+${!variable} }$flags"
      fi
      return 0
    fi
  done < <(_mtp_jax_presets)
  [[ $1 == --list ]] || {
    printf 'error: there is no preset %s; see: launch/env.sh --list\n' "$1" >&2
    return 2
  }
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  case ${1:---help} in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" ;;
    --list) _mtp_jax_preset --list ;;
    --dry-run) _mtp_jax_preset "${2:?error: name a preset}" print ;;
    *)
      printf 'error: variables reach only a shell that sources this file: . launch/env.sh %s\n' "$1" >&2
      exit 2
      ;;
  esac
else
  _mtp_jax_preset "${1:-}"
fi
