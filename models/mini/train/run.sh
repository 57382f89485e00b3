#!/bin/sh
# Builds rerankd-mini on a plain Debian 12 machine: download, tokenizer, groups, initial weights, teacher, training, evaluation.
#
#     TEACHER=ms-marco-MiniLM-L-12-v2 XQUAD=xquad models/mini/train/run.sh
#
# TEACHER: folder of the teacher in transformers' format. XQUAD: folder with xquad.en.json and xquad.zh.json, used to keep
# XQuAD's text out of the training passages, and for evaluation.
# Needs two cores, 16 GB, python3 with venv, npm and apt; 129 minutes for teacher and training, and the time of the other steps.
# Seeds are fixed, but the learning rate follows the clock and Debian's package descriptions change. A second run gives a
# similar model and not the same bytes.
# The committed tokenizer is used; tokenizer.py made it from an earlier state of the passages. NEW_TOKENIZER=1 trains it again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$(dirname "$here")}
export MINI_WORK="${MINI_WORK:-./work}" XQUAD="${XQUAD:?folder of xquad.*.json}" PYTHONPATH="$here"
mkdir -p "$MINI_WORK"
MINI_WORK=$(cd "$MINI_WORK" && pwd)

python3 -m venv "$MINI_WORK/venv"
"$MINI_WORK/venv/bin/pip" install -q -r "$here/requirements.txt"
python="$MINI_WORK/venv/bin/python"

sh "$here/fetch.sh"
{
    "$python" "$here/corpus.py"
    [ -z "${NEW_TOKENIZER:-}" ] || "$python" "$here/tokenizer.py" "$out"
    "$python" "$here/groups.py" "$out/tokenizer.json"
    "$python" "$here/initialise.py" "$out/tokenizer.json"
    "$python" "$here/teach.py" "${TEACHER:?folder of the teacher}" --minutes 12
    "$python" "$here/train.py" "$out" "$MINI_WORK/phase1" --muon --minutes 62
    "$python" "$here/pools.py" "$out/tokenizer.json"
    "$python" "$here/train.py" "$out" "$out" --start "$MINI_WORK/phase1" --pools --muon --lr 7e-4 --minutes 55 --processes 2
    "$python" "$here/evaluate.py" "$out" "$XQUAD" --questions 400 --teacher "$TEACHER"
} 2>&1 | tee "$here/log.txt"
