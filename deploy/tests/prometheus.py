#!/usr/bin/env python3
"""The alerts, the dashboard and the metrics against a real Prometheus.

    apt-get install prometheus && cargo build --release && deploy/tests/prometheus.py [--picture docs/img/dashboard.png]

Checks alerts.yml and its unit tests with promtool, and the layout of the dashboard. Then starts a server with the built-in model,
sends traffic of every kind (answered, refused for several reasons, cancelled, truncated), and has Prometheus scrape it. Fails
unless every metric and label that alerts and dashboard name exists, every query of the dashboard returns data (but those of
NEED_A_GPU), and Prometheus evaluates every alert without an error. --picture draws the panels from Prometheus' data, with
matplotlib. Needs Python 3.9 and Linux; PyYAML and matplotlib from deploy/tests/requirements.txt.
"""

import argparse
import http.client
import http.server
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parent.parent
RERANKD = os.environ.get("RERANKD_BIN") or str(DEPLOY.parent / "target" / "release" / "rerankd")
ALERTS, DASHBOARD = DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "grafana" / "rerankd.json"
NEED_A_GPU = {"rerankd_gpu_memory_used_bytes", "rerankd_gpu_memory_total_bytes"}
# What Prometheus itself adds.
OF_PROMETHEUS = {"up", "ALERTS"}
SCRAPE_S = 1
WORDS = "time person year way day thing man world life hand part child eye woman place work week case".split()
KEYS = {"search": "search-key-of-the-test", "support-bot": "bot-key-of-the-test", "batch": "batch-key-of-the-test"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"FAILED: {what} after {seconds} s")
        time.sleep(0.2)


def call(port, method, path, body=None, key=None, timeout=60):
    """Status and body; status None if there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, {"x-api-key": key} if key else {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException):
        return None, ""
    finally:
        connection.close()


def check_dashboard(dashboard):
    """Ids are unique, panels do not overlap and are inside the grid, data sources are the variable."""
    panels = dashboard["panels"]
    problems = []
    ids = [panel["id"] for panel in panels]
    if len(set(ids)) != len(ids):
        problems.append("two panels have the same id")
    cells = {}
    for panel in panels:
        box = panel["gridPos"]
        if box["x"] + box["w"] > 24:
            problems.append(f"{panel['title']}: beyond the grid")
        for cell in [(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])]:
            if cell in cells:
                problems.append(f"{panel['title']} and {cells[cell]} overlap")
                break
            cells[cell] = panel["title"]
        for source in [panel] + panel.get("targets", []) if panel["type"] != "row" else []:
            if source.get("datasource", {}).get("uid") != "${datasource}":
                problems.append(f"{panel['title']}: the data source is not the variable")
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)(?:\{)?(\w+)", json.dumps(dashboard)))
    if used - names:
        problems.append(f"unknown variables {sorted(used - names)}")
    return problems


def queries(dashboard):
    """(panel, query, legend) of every panel."""
    return [
        (panel, target["expr"], target.get("legendFormat", ""))
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def with_variables(query):
    query = query.replace("$__rate_interval", "15s").replace("$job", "rerankd")
    return re.sub(r"\$(instance|model)", ".*", query)


def metrics_of(query):
    """The metrics of a query, and the labels in the selector of each."""
    found = []
    for name, selector in re.findall(r"\b((?:rerankd|process)_\w+|up|ALERTS)\b(\{[^}]*\})?", query):
        found.append((name, re.findall(r"(\w+)\s*[=!]~?\"", selector)))
    return found


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces and forgets them."""

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def text(rng, words):
    return " ".join(rng.choices(WORDS, k=words))


def traffic(port, seconds):
    """Sends requests of every kind for `seconds`, from several clients."""
    end = time.monotonic() + seconds
    rerank = lambda key, body: call(port, "POST", "/v1/rerank", json.dumps(body), KEYS.get(key, key))

    def steady(seed, key, pause):
        rng = random.Random(seed)
        while time.monotonic() < end:
            documents = [text(rng, rng.choice([20, 60, 200])) for _ in range(rng.randint(3, 25))]
            documents += documents[: rng.randint(0, 4)]
            rerank(key, {"query": text(rng, 6), "documents": documents})
            time.sleep(rng.expovariate(1 / pause))

    def long(seed, key):
        rng = random.Random(seed)
        while time.monotonic() < end:
            documents = [text(rng, 3000), text(rng, 400)]
            rerank(key, {"query": text(rng, 400), "documents": documents, "max_chunks_per_doc": 2})
            time.sleep(2)

    def burst(key):
        rng = random.Random(key)
        time.sleep(seconds * 0.55)
        until = min(end, time.monotonic() + seconds * 0.2)

        def client():
            while time.monotonic() < until:
                rerank(key, {"query": text(rng, 6), "documents": [text(rng, 300) for _ in range(40)]})

        run([client] * 16)

    def wrong(key):
        rng = random.Random(7)
        while time.monotonic() < end:
            rerank(key, {"query": 1})
            rerank(key, {"query": "q", "documents": ["d"], "model": "unknown"})
            rerank("no-key", {"query": "q", "documents": ["d"]})
            call(port, "GET", "/nothing", key=KEYS[key])
            time.sleep(rng.uniform(1, 3))

    def leaving(key):
        rng = random.Random(8)
        while time.monotonic() < end:
            body = json.dumps({"query": "q", "documents": [text(rng, 300) for _ in range(60)]})
            head = f"POST /v1/rerank HTTP/1.1\r\nhost: a\r\nx-api-key: {KEYS[key]}\r\ncontent-length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall((head + body).encode())
                time.sleep(0.2)
            time.sleep(3)

    jobs = [(steady, (1, "search", 0.5)), (steady, (2, "support-bot", 1)), (steady, (3, "search", 0.7)), (long, (4, "batch"))]
    jobs += [(burst, ("batch",)), (wrong, ("support-bot",)), (leaving, ("batch",))]
    run([lambda job=job, arguments=arguments: job(*arguments) for job, arguments in jobs])


def run(functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Prometheus:
    """A Prometheus with the configuration that ships, which scrapes the server at `port` once a second."""

    def __init__(self, port, folder):
        self.port = free_port()
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        config["rule_files"] = [str(ALERTS)]
        config["scrape_configs"][0]["authorization"] = {"credentials": KEYS["search"]}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        path = Path(folder) / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
        self.process = subprocess.Popen(command + [f"--web.listen-address=127.0.0.1:{self.port}"])
        wait_until(lambda: call(self.port, "GET", "/-/ready")[0] == 200, "Prometheus is not ready")

    def get(self, path, **parameters):
        status, body = call(self.port, "GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(body) if body else {}
        if status != 200 or answer["status"] != "success":
            sys.exit(f"FAILED: {path} {parameters}: {status} {answer.get('error')}")
        return answer["data"]

    def range(self, query, start, end):
        return self.get("query_range", query=query, start=start, end=end, step=SCRAPE_S)["result"]


def check_queries(prometheus, dashboard, start, end):
    """Every metric and label exists; every query of the dashboard returns numbers, with the labels of its legend."""
    problems = []
    alerts = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    asked = [(f"alert {rule['alert']}", rule["expr"]) for rule in alerts]
    asked += [(f"panel {panel['title']}", query) for panel, query, _ in queries(dashboard)]
    names = set()
    for where, query in asked:
        for name, labels in metrics_of(query):
            names.add(name)
            if name in NEED_A_GPU | OF_PROMETHEUS:
                continue
            series = prometheus.get("series", **{"match[]": name, "start": start, "end": end})
            missing = [label for label in labels if not any(label in one for one in series)]
            if not series or missing:
                problems.append(f"{where}: {name} {'has no label ' + str(missing) if series else 'does not exist'}")
    for panel, query, legend in queries(dashboard):
        if any(name in NEED_A_GPU for name, _ in metrics_of(query)):
            continue
        result = prometheus.range(with_variables(query), start, end)
        numbers = [float(value) for series in result for _, value in series["values"]]
        if not any(math.isfinite(number) for number in numbers):
            problems.append(f"panel {panel['title']}: no data for {query}")
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            if not any(label in series["metric"] for series in result):
                problems.append(f"panel {panel['title']}: no series has the label {label}")
    for group in prometheus.get("rules")["groups"]:
        problems += [f"alert {rule['name']}: {rule['lastError']}" for rule in group["rules"] if rule["health"] != "ok"]
    print(f"{len(alerts)} alerts and {len(queries(dashboard))} queries name {len(names)} metrics", flush=True)
    return problems


def draw(prometheus, dashboard, start, end, path):
    """The panels as a picture, in the places that they have in the dashboard."""
    import matplotlib

    matplotlib.use("svg" if path.endswith("svg") else "agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    ink, faint, background, panel_color = "#d8d9da", "#9fa7b3", "#111217", "#181b1f"
    colors = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d", "#ffb357", "#ca95e5"]

    def shown(value, unit):
        if unit == "percentunit":
            return f"{value * 100:g} %"
        if unit == "s":
            return f"{value * 1e3:g} ms" if 0 < abs(value) < 1 else f"{value:g} s"
        if unit == "bytes":
            for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
                if abs(value) >= size:
                    return f"{value / size:.3g} {name}"
            return f"{value:g} B"
        return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} K" if value >= 1e3 else f"{value:g}"

    plt.rcParams.update({"font.size": 7, "text.color": ink, "axes.labelcolor": faint, "xtick.color": faint, "ytick.color": faint})
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(15, height * 0.21), facecolor=background, dpi=110)
    for panel in panels:
        box = panel["gridPos"]
        left, bottom = box["x"] / 24, 1 - (box["y"] + box["h"]) / height
        if panel["type"] == "row":
            figure.text(left + 0.006, bottom + 0.3 / height, "▾ " + panel["title"], fontsize=9, weight="bold")
            continue
        w, h = box["w"] / 24, box["h"] / height
        figure.add_artist(plt.Rectangle((left + 0.002, bottom + 0.15 / height), w - 0.004, h - 0.3 / height, color=panel_color, zorder=-1))
        figure.text(left + 0.007, bottom + h - 1.1 / height, panel["title"], fontsize=8, weight="medium")
        lines = []
        for target in panel["targets"]:
            for series in prometheus.range(with_variables(target["expr"]), start, end):
                name = re.sub(r"\{\{(\w+)\}\}", lambda label: series["metric"].get(label[1], ""), target.get("legendFormat", ""))
                points = {float(at) - start: float(value) for at, value in series["values"]}
                lines.append((name or ", ".join(f"{k} {v}" for k, v in series["metric"].items()), points))
        unit = panel["fieldConfig"]["defaults"].get("unit", "short")
        if panel["type"] == "table" or not lines:
            what = "\n".join(f"{name}: {list(points.values())[-1]:g}" for name, points in lines) or "No data (needs a GPU)"
            figure.text(left + w / 2, bottom + h / 2, what, ha="center", va="center", color=faint, fontsize=8)
            continue
        axes = figure.add_axes((left + 0.034, bottom + 2.1 / height, w - 0.044, h - 3.6 / height), facecolor=panel_color)
        times = [i * SCRAPE_S for i in range(int((end - start) / SCRAPE_S) + 1)]
        values = [[points.get(float(at), math.nan) for at in times] for _, points in lines]
        stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
        if stacked:
            filled = [[0 if math.isnan(value) else value for value in row] for row in values]
            axes.stackplot(times, filled, colors=(colors * 3)[: len(filled)], alpha=0.55, linewidth=0)
        else:
            for i, row in enumerate(values):
                axes.plot(times, row, color=colors[i % len(colors)], linewidth=1.1)
        finite = [value for row in values for value in row if math.isfinite(value)]
        top = panel["fieldConfig"]["defaults"].get("max")
        axes.set_xlim(0, end - start)
        axes.set_ylim(0, top * 1.02 if top else None if finite and max(finite) > 0 else 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: shown(value, unit)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
        axes.locator_params(axis="y", nbins=4)
        axes.grid(color="#2c3235", linewidth=0.5)
        axes.tick_params(length=0, labelsize=6)
        for side in axes.spines.values():
            side.set_visible(False)
        at, columns = left + 0.008, 0
        for i, (name, _) in enumerate(lines):
            wide = 0.0042 * len(name) + 0.014
            if at + wide > left + w - 0.004:
                figure.text(at, bottom + 0.45 / height, "…", color=faint, fontsize=6.5)
                break
            figure.text(at, bottom + 0.45 / height, "━", color=colors[i % len(colors)], fontsize=7)
            figure.text(at + 0.008, bottom + 0.45 / height, name, color=ink, fontsize=6.5)
            at += wide
    figure.savefig(path, facecolor=background)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=90, help="of traffic")
    parser.add_argument("--picture", metavar="FILE", help="draws the panels, as .png or .svg")
    options = parser.parse_args()
    subprocess.run(["promtool", "check", "rules", ALERTS], check=True)
    subprocess.run(["promtool", "test", "rules", ALERTS.with_name("alerts_test.yml")], check=True)
    dashboard = json.loads(DASHBOARD.read_text())
    problems = check_dashboard(dashboard)
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            keys = Path(folder) / "keys"
            keys.write_text("".join(f"{key} name={name}\n" for name, key in KEYS.items()))
            port = free_port()
            command = [RERANKD, "serve", "--port", str(port), "--threads", "1", "--api-key-file", keys, "--log", "warn"]
            command += ["--max-queue-tokens", "60000", "--max-queue-wait", "2", "--key-tokens-per-minute", "400000"]
            command += ["--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}"]
            server = subprocess.Popen(command)
            processes.append(server)
            wait_until(lambda: call(port, "GET", "/ready")[0] == 200, "the server is not ready")
            prometheus = Prometheus(port, folder)
            processes.append(prometheus.process)
            start = time.time()
            traffic(port, options.seconds)
            wait_until(lambda: call(port, "GET", "/health")[0] == 200, "the server is not healthy")
            time.sleep(3 * SCRAPE_S)
            start, end = math.floor(start), math.floor(time.time())
            exposed = call(port, "GET", "/metrics", key=KEYS["search"])[1]
            if any(key in exposed for key in KEYS.values()):
                problems.append("a key is in the metrics")
            lint = subprocess.run(["promtool", "check", "metrics"], input=exposed, text=True, capture_output=True)
            if lint.returncode != 0:
                problems.append(f"promtool check metrics: {lint.stdout}{lint.stderr}")
            problems += check_queries(prometheus, dashboard, start, end)
            errors = prometheus.get("query", query="sum by (cause) (rerankd_request_errors_total)")["result"]
            print("errors:", {one["metric"]["cause"]: int(float(one["value"][1])) for one in errors}, flush=True)
            if options.picture:
                draw(prometheus, dashboard, start, end, options.picture)
            server.send_signal(signal.SIGKILL)
            pending = lambda: any(alert["labels"]["alertname"] == "RerankdDown" for alert in prometheus.get("alerts")["alerts"])
            wait_until(pending, "RerankdDown is not pending though the server is down", 15)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if problems:
        sys.exit("FAILED:\n" + "\n".join(problems))
    print("every metric, label, query and alert was found")


if __name__ == "__main__":
    main()
