#!/bin/sh
# Makes rerankd-mini from a plain Debian 12 machine: fetch, tokenizer, groups, start weights, teacher, training, evaluation.
#
#     TEACHER=ms-marco-MiniLM-L-12-v2 XQUAD=xquad models/mini/train/run.sh
#
# TEACHER is a folder with the teacher in transformers' form, XQUAD one with xquad.en.json and xquad.zh.json (used to
# keep its text out of the training passages, and for evaluation). Two cores, 16 GB and two hours are enough.
# Needs: python3 with venv, npm, apt. Seeds are fixed, but the learning rate follows the clock and Debian's package
# descriptions change, so a second run gives a like model and not the same bytes. The tokenizer is the committed one, which
# tokenizer.py made from an earlier state of the passages; NEW_TOKENIZER=1 makes it afresh.
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
