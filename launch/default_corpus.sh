#!/usr/bin/env bash
# Fetches and tokenizes the default corpus, the State of the Union speeches: writes data/sotu_{train,valid}.* and
# data/sotu.model, unless these files exist. Needs the environment of launch/setup_env.sh.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
prefix=data/sotu
mkdir -p "${prefix%/*}"
# Let only one process at a time do this, because tasks of a job array may start together.
if command -v flock >/dev/null; then
    exec 9<"${prefix%/*}"
    flock 9
fi
for file in "$prefix"_{train,valid}.{bin,idx} "$prefix.model"; do
    if [[ ! -f "$file" ]]; then
        [[ -f "$prefix.jsonl" ]] || python launch/fetch_corpus.py --output "$prefix.jsonl"
        python launch/prepare_data.py --input "$prefix.jsonl" --output "$prefix" \
            --vocab_size 4096 --valid_fraction 0.02 --workers "$(nproc)"
        break
    fi
done
