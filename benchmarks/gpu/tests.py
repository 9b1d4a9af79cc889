"""The tests that need a CUDA device, as one part: how many pass, and what fails.

python -m benchmarks.gpu.tests          # about 60 s
python -m benchmarks.gpu.tests --dry    # what of them runs on a CPU too
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.rows import ROOT, WORK, Part, parser_of

INTERRUPTED_S = 20.0
"""Seconds that an interrupted pytest has to report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="an expression of pytest's -k")
    options = parser.parse_args(arguments)
    part = Part("tests", options)
    report = WORK / f"tests{'_dry' if part.dry else ''}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    environment = {**os.environ, "COLM_DS_GPU_TESTS_ON_CPU": "1" if part.dry else ""}
    if not part.dry:
        environment["TORCHDYNAMO_DISABLE"] = "0"  # the fused geometry is compiled, as in training
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-m", "gpu or not gpu" if part.dry else "gpu"]
    command += [
        "-o",
        "minversion=8.0",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        "--tb=short",
        "--durations=8",
        "--timeout=60",
    ]
    command += ["-k", options.only] if options.only else []
    code = run_for(command, environment, max(10.0, part.left_s))
    cases = read_report(report.read_text(encoding="utf-8")) if report.is_file() else []
    cases = cases[:-1] if isinstance(code, str) else cases  # the one that was interrupted
    for case in cases:
        part.add(case.pop("key"), case)
    if not cases:
        part.failed("pytest", RuntimeError(f"{code}; no report"))
    elif isinstance(code, str):
        part.note(f"{code}: {len(cases)} tests were run")
    for row in part.rows:
        if row["outcome"] == "failed":
            part.failed(row["key"], RuntimeError(row["message"]))
    counts = {name: sum(row["outcome"] == name for row in part.rows) for name in ("passed", "failed", "skipped")}
    part.note(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return part.close()


def run_for(command: Sequence[str], environment: dict[str, str], seconds: float) -> int | str:
    """Run pytest in the project, and interrupt it after some seconds, so that it reports what it has done."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    for until in (seconds, INTERRUPTED_S):
        try:
            code = process.wait(until)
            return code if until == seconds else "took too long"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
    process.kill()
    process.wait()
    return "took too long, and did not stop"


def read_report(text: str) -> list[dict[str, Any]]:
    """Return test, outcome, seconds and message of a JUnit report."""
    cases = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        bad = next((one for one in case if one.tag in ("failure", "error")), None)
        skipped = next((one for one in case if one.tag == "skipped"), None)
        reason = bad if bad is not None else skipped
        cases.append(
            {
                "key": f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}",
                "outcome": "failed" if bad is not None else "skipped" if skipped is not None else "passed",
                "seconds": float(case.get("time", 0.0)),
                "message": "" if reason is None else f"{reason.get('message', '')} {reason.text or ''}"[-2500:],
            }
        )
    return cases


if __name__ == "__main__":
    sys.exit(main())
