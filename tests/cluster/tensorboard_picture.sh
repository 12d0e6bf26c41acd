#!/usr/bin/env bash
# TensorBoard's page over a run directory, or a folder of them, as headless Chromium shows it: losses, and how the
# multipliers of one role have spread. As root: server and browser run in a network namespace that has only loopback,
# so that nothing leaves the machine.
#
#     tests/cluster/tensorboard_picture.sh LOGDIR FILE.png [RUN]
#
# RUN is the run, as TensorBoard names it, whose histograms are shown. `tensorboard` comes from PATH (source
# launch/setup_env.sh), the browser from Debian, what drives it from the package index.
set -euo pipefail

if [[ "$#" -lt 2 || "$#" -gt 3 ]]; then
    sed -n '6s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
if [[ -z "${PICTURE_WORK:-}" ]]; then
    "$(dirname -- "${BASH_SOURCE[0]}")/install.sh" --all
    PICTURE_WORK="$(mktemp -d)"
    trap 'rm -rf "$PICTURE_WORK"' EXIT
    python3 -m venv "$PICTURE_WORK/venv"
    "$PICTURE_WORK/venv/bin/pip" install --quiet --disable-pip-version-check playwright pillow
    PICTURE_WORK="$PICTURE_WORK" unshare --net bash "${BASH_SOURCE[0]}" "$@"
    exit
fi
logdir="$1" picture="$2" run="${3:-}"
address=http://127.0.0.1:6006
ip link set lo up

# Without its data server, a program of its own that looks for work in /proc, TensorBoard reads the files itself.
tensorboard --logdir "$logdir" --host 127.0.0.1 --port 6006 --load_fast=false >"$PICTURE_WORK/tensorboard.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

# It answers before it has read the files, with no run in the list.
runs=""
for _ in {1..300}; do
    runs="$(curl -sf --noproxy '*' "$address/data/runs" || true)"
    [[ -z "$runs" || "$runs" == "[]" ]] || break
    kill -0 "$server" 2>/dev/null || {
        cat "$PICTURE_WORK/tensorboard.log" >&2
        exit 1
    }
    sleep 0.2
done
[[ -n "$runs" && "$runs" != "[]" ]] || {
    echo "error: TensorBoard found no run in $logdir within a minute" >&2
    exit 1
}

# Driven in real time: under Chromium's virtual time (--screenshot) the charts, which a worker draws, stay empty.
"$PICTURE_WORK/venv/bin/python" - "$address" "$picture" "$run" <<'PY'
import json
import sys
import urllib.parse

from PIL import Image
from playwright.sync_api import sync_playwright

address, picture, run = sys.argv[1:]
pins = [{"plugin": "scalars", "tag": "train/loss"}, {"plugin": "scalars", "tag": "valid/loss"}]
for tag in ("multipliers/down/row", "multipliers/down/col") if run else ():
    pins.append({"plugin": "histograms", "tag": tag, "runId": f"defaultExperimentId/{run}"})
query = urllib.parse.urlencode({"smoothing": 0, "pinnedCards": json.dumps(pins, separators=(",", ":"))})
flags = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.goto(f"{address}/?{query}#timeseries", timeout=120_000)
    page.wait_for_selector("metrics-pinned-view scalar-card line-chart", timeout=120_000)
    page.click("button:has-text('Settings')")  # shown at first, and a quarter of the page
    page.wait_for_timeout(8_000)  # the lines, and the axes' way to them, have no end that the page tells
    cards = page.locator("metrics-pinned-view card-view").count()
    page.screenshot(path=picture)
    browser.close()
if cards != len(pins):
    sys.exit(f"error: {cards} cards are shown, {len(pins)} were asked for: {picture}")
# 64 colours are enough for a page of charts, and a third of the bytes.
Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)
PY
echo "$picture: $(stat --format=%s "$picture") bytes"
