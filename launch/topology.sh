# shellcheck shell=bash
# Names of TPU slices: the Cloud TPU API and xpk count chips or cores; the compiler and Kubernetes need a shape.

# Sets TOPOLOGY (as mtp_jax.preflight takes it), SHAPE, CHIPS and RUNTIME for an accelerator type such as v5litepod-16.
# shellcheck disable=SC2034
find_topology() { # accelerator type
  local kind=${1%-*} size=${1##*-} shapes pair
  case $kind in
    v5litepod) GENERATION=v5e RUNTIME=v2-alpha-tpuv5-lite ;;
    v6e) GENERATION=v6e RUNTIME=v2-alpha-tpuv6e ;;
    v5p) GENERATION=v5p RUNTIME=v2-alpha-tpuv5 ;;
    v4 | v3 | v2) GENERATION=$kind RUNTIME=tpu-ubuntu2204-base ;;
    tpu7x) GENERATION=$kind RUNTIME='' ;;
    *) die "--accelerator-type $1: should be v2-N, v3-N, v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N." ;;
  esac
  case $kind in
    v5litepod | v6e) shapes='1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16' ;;
    v2) shapes='8:2x2 32:4x4 128:8x8 256:8x16 512:16x16' ;;
    v3) shapes='8:2x2 32:4x4 64:4x8 128:8x8 256:8x16 512:16x16 1024:16x32 2048:32x32' ;;
    # In these names the number counts cores, two per chip.
    *) shapes='8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 512:4x8x8 1024:8x8x8 2048:8x8x16 4096:8x16x16' ;;
  esac
  SHAPE=''
  for pair in $shapes; do
    if [[ ${pair%%:*} == "$size" ]]; then SHAPE=${pair#*:}; fi
  done
  [[ -n $SHAPE ]] ||
    die "--accelerator-type $1: there is no such slice; $kind comes as $kind-{$(for pair in $shapes; do printf '%s,' "${pair%%:*}"; done | sed 's/,$//')}."
  TOPOLOGY=$GENERATION:$SHAPE
  CHIPS=$((${SHAPE//x/*}))
}
