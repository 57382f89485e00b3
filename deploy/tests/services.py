#!/usr/bin/env python3
"""Checks deploy/compose.yaml and deploy/systemd/rerankd.service, and that planted mistakes in both are found. Starts nothing.

deploy/tests/static.sh calls this. Needs check-jsonschema, which has the schema of Compose files, and systemd-analyze.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent.parent
COMPOSE = (DEPLOY / "compose.yaml").read_text()
UNIT = (DEPLOY / "systemd" / "rerankd.service").read_text()
SCHEMA = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.compose-spec"]
# Tenths of a point of `systemd-analyze security`: 1.2 when this was written; 2.0 is the highest that it calls low.
MAX_EXPOSURE = 20


def run(*command):
    """The output if the command fails, else nothing."""
    environment = {**os.environ, "RERANKD_API_KEY": "key"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return "" if done.returncode == 0 else done.stdout + done.stderr or f"exit code {done.returncode}"


def check_compose(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "compose.yaml")
        path.write_text(text)
        problem = run(*SCHEMA, str(path))
        if not problem and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
            problem = run("docker", "compose", "--file", str(path), "--profile", "*", "config", "--quiet")
        return problem


def check_unit(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rerankd.service")
        # A program that exists; `verify` looks for it.
        path.write_text(text.replace("/usr/local/bin/rerankd", "/bin/true"))
        # `verify` only warns about unknown lines.
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rerankd.service" in line]
        exposure = ["systemd-analyze", "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", str(path)]
        return "\n".join(lines) or run(*exposure)


def check_stop_times(_):
    """All ways to stop the server wait longer than its default drain of 30 s."""
    unit, compose = re.search(r"TimeoutStopSec=(\d+)", UNIT), re.search(r"stop_grace_period: (\d+)s", COMPOSE)
    return "" if min(int(unit[1]), int(compose[1])) > 30 else "a stop timeout is not more than 30 s"


def report(what, failed, text):
    print(f"{'FAIL' if failed else 'ok  '}  {what}{': ' + text.strip()[:300] if failed else ''}")
    return failed


def main():
    failed = False
    unit_check = check_unit if shutil.which("systemd-analyze") else None
    if unit_check is None:
        print("SKIPPED: the systemd unit, because systemd-analyze is not installed")
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        print("      docker compose is not installed; its schema is checked")
    for what, check, text in (
        ("compose.yaml", check_compose, COMPOSE),
        ("rerankd.service", unit_check, UNIT),
        ("stop times", check_stop_times, ""),
    ):
        if check:
            problem = check(text)
            failed |= report(what, bool(problem), problem)
    for what, check, text, old, new in (
        ("an unknown key in compose.yaml", check_compose, COMPOSE, "stop_grace_period", "stop_grace"),
        ("a wrong type in compose.yaml", check_compose, COMPOSE, "read_only: true", "read_only: [true]"),
        ("an unknown line in rerankd.service", unit_check, UNIT, "LimitNOFILE", "LimitNOFILES"),
        ("a wrong value in rerankd.service", unit_check, UNIT, "Restart=on-failure", "Restart=on-error"),
        ("no hardening in rerankd.service", unit_check, UNIT, UNIT[UNIT.index("DynamicUser") : UNIT.index("[Install]")], ""),
    ):
        if check:
            assert old in text, old
            failed |= report(f"planted mistake, {what}", not check(text.replace(old, new)), "not found")
    sys.exit(failed)


if __name__ == "__main__":
    main()
