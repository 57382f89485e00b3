#!/bin/sh
# Makes rerankd-mini from a plain Debian 12 machine: fetch, tokenizer, groups, start weights, teacher, training, evaluation.
#
#     TEACHER=ms-marco-MiniLM-L-12-v2 XQUAD=xquad models/mini/train/run.sh
#
# TEACHER is a folder with the teacher in transformers' form, XQUAD one with xquad.en.json and xquad.zh.json (used to
# keep its text out of the training passages, and for evaluation). Two cores, 8 GB and two hours are enough.
# Needs: python3 with venv, npm, apt. MINUTES and MORE_MINUTES are the training time; seeds are fixed, but the length curriculum and
# the learning rate follow the clock, so a second run gives a like model and not the same bytes.
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
    "$python" "$here/tokenizer.py" "$MINI_WORK/tokenizer"
    "$python" "$here/groups.py" "$MINI_WORK/tokenizer/tokenizer.json"
    "$python" "$here/initialise.py" "$MINI_WORK/tokenizer/tokenizer.json"
    "$python" "$here/teach.py" "${TEACHER:?folder of the teacher}" "$MINI_WORK/tokenizer" --groups "${TEACHER_GROUPS:-1600}"
    # Two runs of one schedule. The second sees more one-word groups, which the first had all but ignored.
    "$python" "$here/train.py" "$MINI_WORK/tokenizer" "$out" --minutes "${MINUTES:-24}" --end .45 --xquad "$XQUAD"
    "$python" "$here/train.py" "$MINI_WORK/tokenizer" "$out" --start "$MINI_WORK/last.pt" --begin .45 --word-share .14 \
        --minutes "${MORE_MINUTES:-27}" --xquad "$XQUAD"
    "$python" "$here/evaluate.py" "$out" "$XQUAD" --teacher "$TEACHER"
} 2>&1 | tee "$here/log.txt"
