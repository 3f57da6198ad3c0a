#!/usr/bin/env bash
# gauntlet.sh: run the experiments of gauntlet.txt, one clean process a run, and put them into one table.
#
# This file launches; planning, judging and tables are records/report.py's, metrics come from result.json.
# Works in bash 3.2 and later.
set -euo pipefail

usage() {
  cat <<'TEXT'
gauntlet.sh VERB [ROW or GROUP ...] [options]

  list             every row by group, with what train_gpt.py cannot run yet
  plan             what run would do, without doing it
  run              do it; finished runs are skipped, interrupted ones resumed, failures do not stop the rest
  report [DIR]     table (Markdown, CSV) and plots of a gauntlet folder
  record ...       a submission folder from finished runs (gauntlet.sh record --help)

options of plan and run (gauntlet.sh plan --help has all):
  --gpus N         processes of a run (default 1)        --seeds 1337,42  seeds of every row
  --steps N        ITERATIONS=N and no clock             --vocab V        VOCAB_SIZE=V
  --budget NAME    sprint, clock or full                 --set KEY=VALUE  any variable, for every row
  --incr-only --deq-only --seeds-only --mod-only --muon-only --rlma-only --skip-deq --skip-baseline
  --runs DIR       where run folders go (default runs/gauntlet); the table holds every run in it
  --script FILE    another script with the same variables, as a row of its own (--name NAME)
  --retry          run failed runs again; --again: finished ones as well (old folders move to DIR/.old)
  --cold           an empty compile cache for every run (default: one cache for all, in DIR/.cache)

Where the text is comes from DATA_DIR, DATASET, DATA_PATH and TOKENIZER_PATH; no other variable of yours reaches a run.
Exit code: 0 all runs done and all accept rules hold; 1 not so; 2 bad input; 130, 143 interrupted (run it again).
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export GAUNTLET_FROM=$PWD
python=${PYTHON:-python3}
report() { "$python" "$root/records/report.py" "$@"; }

child=0          # the process group of the run in hand
stopped=0        # 130 or 143 once somebody asked to stop
stop() {
  if ((child)); then
    if ((stopped)); then
      kill -KILL -- "-$child" 2>/dev/null || true
    else
      say "stopping: the run in hand saves a checkpoint (once more kills it)"
      kill -TERM -- "-$child" 2>/dev/null || true
    fi
  fi
  stopped=$1
}

say() { printf '%s\n' "$*"; }

clock() { printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); }

# Variables of this machine that a run needs; everything else is left behind.
keep_machine() {
  local name
  machine=()
  for name in $(compgen -e); do
    case $name in
      PATH | HOME | USER | LANG | LC_* | TMPDIR | LD_LIBRARY_PATH | LIBRARY_PATH | VIRTUAL_ENV | PYTHONPATH | CC | CXX | \
        OMP_NUM_THREADS | CUDA_* | NVIDIA_* | NCCL_*) machine+=("$name=${!name}") ;;
    esac
  done
}

# The newest line of a log that tells how far a run is.
progress() {
  tail -c 8192 "$1" 2>/dev/null | tr '\r' '\n' |
    grep -aE '^(step:)?[0-9]+/[0-9]+ |^(warmup_step|GPTQ|ttt|diagnostic|quantized|preflight)' | tail -n 1 | cut -c1-110 || true
}

# Show how the run in hand gets on, until it ends: watch_run LABEL FOLDER
watch_run() {
  local began=$SECONDS line last="" shown=0
  while kill -0 "$child" 2>/dev/null; do
    line=$(progress "$2/console.log")
    if [[ -t 1 ]]; then
      printf '\r\033[K%s %s %s' "$1" "$(clock $((SECONDS - began)))" "${line:-starting}"
    elif [[ -n $line && $line != "$last" ]] && ((SECONDS - shown >= ${GAUNTLET_EVERY:-20} || shown == 0)); then
      say "$1 $(clock $((SECONDS - began))) $line"
      last=$line shown=$SECONDS
    fi
    sleep "${GAUNTLET_TICK:-1}" || true
  done
  if [[ -t 1 ]]; then
    printf '\r\033[K'
  elif [[ -z $last ]]; then # too short a run to have been caught at it
    line=$(progress "$2/console.log")
    if [[ -n $line ]]; then say "$1 $line"; fi
  fi
}

# Start a run in a process group of its own, so that a Ctrl-C reaches it once, through stop.
launch() { # FOLDER GPUS SCRIPT, variables in settings
  local folder=$1 gpus=$2 script=${3:-$root/train_gpt.py} where=$root cache=$runs/.cache
  local command=("$python" "$script")
  if [[ -n ${3:-} ]]; then where=$folder; fi
  if ((cold)); then cache=$folder/.cache; fi
  if ((gpus > 1)); then
    # torchrun ends with 1 whatever a rank ended with: every rank leaves its own code.
    # shellcheck disable=SC2016
    command=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$gpus" --no-python bash -c
      'trap : TERM INT; code=0; "${@:2}" || code=$?; echo "$code" >"$1/.exit.$RANK"; exit "$code"' rank
      "$folder" "${command[@]}")
  fi
  set -m
  (
    cd "$where"
    exec env -i "${machine[@]}" PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$cache/inductor" \
      TORCHINDUCTOR_FX_GRAPH_CACHE=1 TRITON_CACHE_DIR="$cache/triton" "${settings[@]}" "${command[@]}"
  ) </dev/null >>"$folder/console.log" 2>&1 &
  child=$!
  set +m
  say "$child" >"$folder/.pid"
}

# One run from request to verdict: one_run LABEL FOLDER GPUS SCRIPT ACTION REQUEST
one_run() {
  local label=$1 folder=$2 code=0 line lines flags=()
  if [[ $5 == resume ]]; then flags=(--resume); fi
  lines=$(report begin "$folder" "$6" ${flags[@]+"${flags[@]}"})
  settings=()
  while IFS= read -r line; do settings+=("$line"); done <<<"$lines"
  if ((stopped)); then return; fi
  launch "$folder" "$3" "$4"
  watch_run "$label" "$folder"
  wait "$child" || code=$?
  child=0
  flags=()
  if ((stopped)); then flags=(--stopped); fi
  say "$label $(report settle "$folder" "$code" ${flags[@]+"${flags[@]}"} || true)"
}

# Every run of the plan, in order.
run_plan() {
  local total=0 number=0 began=$SECONDS action folder gpus script reason request left=""
  while IFS=$'\x1f' read -r action _; do
    case $action in run | resume) total=$((total + 1)) ;; esac
  done <<<"$1"
  while IFS=$'\x1f' read -r action folder gpus script reason request <&3; do
    if ((stopped)); then return; fi
    case $action in
      skip) say "${folder##*/}: finished earlier" ;;
      run | resume)
        if ((number)); then left=" about $(clock $(((SECONDS - began) * (total - number) / number))) left"; fi
        number=$((number + 1))
        say "[$number/$total] ${folder##*/}: ${reason:-starting}$left"
        one_run "[$number/$total] ${folder##*/}" "$folder" "$gpus" "$script" "$action" "$request"
        ;;
      *) say "${folder##*/}: $action: $reason" ;;
    esac
  done 3<<<"$1"
}

run_verb() {
  local planned code=0
  planned=$(report plan --machine "$@")
  IFS=$'\x1f' read -r runs cold <<<"$planned"
  mkdir -p "$runs/.cache"
  keep_machine
  trap 'stop 130' INT
  trap 'stop 143' TERM
  run_plan "${planned#*$'\n'}"
  say ""
  report judge "$runs" || code=$?
  if ((stopped)); then
    say "interrupted; the same command goes on from here"
    exit "$stopped"
  fi
  exit "$code"
}

verb=${1:-help}
if (($#)); then shift; fi
case $verb in
  list | plan | record) report "$verb" "$@" ;;
  run) run_verb "$@" ;;
  report)
    if ((!$#)); then set -- "$root/runs/gauntlet"; fi
    report table "$@"
    report plots "$1"
    ;;
  help | -h | --help) usage ;;
  *)
    usage >&2
    printf 'error: no verb %s\n' "$verb" >&2
    exit 2
    ;;
esac
