#!/usr/bin/env bash
# Measures what the tables and plots of README.md and docs/perf.md show: perf/all.sh [part ...], from the root of the
# repository, with the package and its peers installed. Without parts: all of them, about 20 minutes on one H200.
#
#   PYTHON=python3 OUT=perf/results perf/all.sh kernels layers
#
# Kernels are compiled ahead, side by side, so that the GPU waits for little. Each part has a limit of its own: one that
# hangs does not take the others with it. The exit status is that of the worst part.
set -u
PYTHON=${PYTHON:-python3} OUT=${OUT:-perf/results} LOG=${LOG:-/dev/null} JOBS=${JOBS:-$(nproc)}
peers="scattermoe grouped_mm cublas"
all_peers="$peers grouped_mm-compiled loop"  # the first compiles for seconds, for every shape and number of tokens
worst=0

# step LIMIT_S ARGUMENTS of perf.run
step() {
  local limit=$1 start=$SECONDS status; shift
  timeout "$limit" "$PYTHON" -m perf.run "$@" --quiet --out "$OUT" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  echo "== status $status after $((SECONDS - start)) s: perf.run $*" | tee -a "$LOG"
  [ "$status" -gt "$worst" ] && worst=$status
}

# ahead "SHAPES" ARGUMENTS: what these shapes need, into the caches; measures nothing
ahead() {
  local shapes=$1; shift
  printf '%s\n' $shapes | OMP_NUM_THREADS=2 xargs -P "$JOBS" -I{} timeout 150 "$PYTHON" -m perf.run {} \
    --repeats 1 --warm-seconds 0 --no-check --quiet --out "$scratch" "$@" >/dev/null 2>&1
}

kernels() { step 120 main --what kernels; }
layers() {
  ahead "7b 1.4b 30b 120b" --module --peer scattermoe
  step 300 7b 1.4b 30b 120b --module --peer $all_peers
}
twelve() {
  local shapes="1.4b-512 1.4b-1024 7b-512 7b-1024 30b-512 30b-1024 120b-1024 120b-2048"
  ahead "$shapes" --tokens 256 --peer scattermoe
  step 360 $shapes --repeats 15 --peer $all_peers
}
open() {
  ahead "olmoe qwen3-235b qwen3-next gpt-oss-20b kimi-linear" --tokens 256 --peer scattermoe
  step 360 open --repeats 12 --peer $all_peers
}
memory() {
  ahead "1.4b 1.4b-512 1.4b-1024 7b 7b-512 7b-1024 30b 30b-512 30b-1024 120b 120b-1024 120b-2048" --tokens 256 --no-router
  step 200 twelve --what memory --peer scattermoe grouped_mm
}
router() { step 150 --what router; }
experts() { step 100 7b 30b 120b --no-router --what backward --peer cublas; }
host() { step 120 7b --what host --peer scattermoe grouped_mm; }
breakdown() { step 100 7b 30b --what breakdown; }
first() { step 150 7b --what first-call; }
rounding() {
  local shapes; shapes=$("$PYTHON" -c 'from perf.shapes import TOKEN_ROUNDING; print(*(s.name for s in TOKEN_ROUNDING))')
  ahead "$shapes" --tokens 512 --no-router --routing topk token_rounding
  step 240 token-rounding --no-router --routing topk token_rounding
}
tokens() {
  step 180 7b --tokens 256 512 1024 2048 4096 8192 16384 32768 65536 131072 --peer $peers
  step 90 7b --tokens 256 512 1024 2048 --from-idle --peer scattermoe grouped_mm
}
adapter() { step 100 --thiek 16384,2048,768,128,8 --peer transformers-grouped_mm sonicmoe.transformers; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
all="kernels layers experts host breakdown router memory twelve rounding tokens first open adapter"
for part in ${*:-$all}; do
  case " $all " in
    *" $part "*) "$part" ;;
    *) echo "perf/all.sh: no part $part, only $all" >&2; exit 2 ;;
  esac
done
exit "$worst"
