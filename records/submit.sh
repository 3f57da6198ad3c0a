#!/usr/bin/env bash
# From a machine with data to a submission folder: every seed of a row is run, audited, and written up.
#
#   records/submit.sh ROW NAME AUTHOR GITHUB_ID [options of gauntlet.sh run]
#
# For the official run, on 8 H100: records/submit.sh record_8gpu MyIdea "Ada L." ada --gpus 8
# A rehearsal on another machine: TRACK=non_record_16mb records/submit.sh record MyIdea "Ada L." ada --gpus 2
# What is finished is not done again, so the same command goes on after an interruption, with --retry after a failure.
# Text: DATA_DIR, DATASET, DATA_PATH, TOKENIZER_PATH.
# RUNS (runs/submit) is where the runs go, OUT (records) where the folder goes, NOTES a Markdown file on what is new.
set -euo pipefail

if (($# < 4)); then
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
row=$1 name=$2 author=$3 github=$4
shift 4
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=${RUNS:-$root/runs/submit}
python=${PYTHON:-python3}

"$root/gauntlet.sh" run "$row" --runs "$runs" "$@" || {
  code=$?
  ((code != 1)) || printf 'no folder: a run or an accept rule of %s failed (above); --retry repeats failed runs\n' "$row" >&2
  exit $code
}
for folder in "$runs/$row"-s*/; do
  if [[ ! -e $folder/audit.txt ]]; then
    printf 'auditing %s\n' "$folder"
    "$python" "$folder/train_gpt.py" audit "$folder"
  fi
done
"$root/gauntlet.sh" record "$runs" --row "$row" --name "$name" --author "$author" --github-id "$github" \
  --track "${TRACK:-10min_16mb}" --out "${OUT:-$root/records}" ${NOTES:+--notes "$NOTES"}
