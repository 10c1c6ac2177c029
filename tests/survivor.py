"""A fork server: runs the command line in real processes that can be killed, without importing PyTorch for each.

It reads a JSON request a line and answers with one. A request's ``stop`` sends a signal to the process at the end of a
stage's work, before the stage is finished; ``pause`` holds a stage until the process is killed. ``seconds`` is how long
it may take, ``room`` how many bytes of memory it may add to what it begins with,
``kill_after`` how many seconds it has to live; ``stop_measuring`` kills a search in that measurement of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

METHODS = {
    "model": "load", "trace": "trace", "passes": "patch", "precision": "type", "engine": "build", "parity": "prove",
    "latency": "time",
}  # fmt: skip


class ForkServer:
    """The tests' end of it."""

    def __init__(self) -> None:
        command = [sys.executable, "-u", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def export(self, *arguments: object, **request: Any) -> dict[str, Any]:
        """Run ``effdeploy export riformer ...``; ``wait=False`` returns while it runs."""
        request["arguments"] = ["export", "riformer", "--variant", "tiny", "--size", "32", *map(str, arguments)]
        return self.ask(request)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def serve() -> None:
    import deploy.stages
    from deploy.linting.table import table
    from deploy.models import find_system
    from deploy.models.base import count_macs
    from deploy.store import code_version

    for room in ("cli", "contents", "comparing", "linting.show", "planning", "predicting", "report", "report.html"):
        importlib.import_module(f"deploy.{room}")
    table()
    code_version()  # the same for all children
    system = find_system("riformer")
    count_macs(system, {**system.variants["tiny"].options, "classes": 10}, (32, 32))  # without arithmetic; imports much
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may have inherited "ignore"
    real = sys.stdout
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        if "wait_for" in request:
            real.write(json.dumps(_answer(request["wait_for"], Path(request["output"]))) + "\n")
            continue
        output = Path(request["output"]).with_suffix(f".{number}")
        if (pid := os.fork()) == 0:
            _become(request, output, deploy.stages.Work)
        answer = {"pid": pid, "output": str(output)} if request.get("wait") is False else _answer(pid, output)
        real.write(json.dumps(answer) + "\n")


def _answer(pid: int, output: Path) -> dict[str, Any]:
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "output": output.read_text()}


def _become(request: dict[str, Any], output: Path, work: Any) -> None:
    code = 99
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        _prepare(request, work)
        from deploy.cli import main

        sys.argv = ["effdeploy", *request["arguments"]]
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare(request: dict[str, Any], work: Any) -> None:
    os.environ["EFFDEPLOY_CACHE"] = request["cache"]
    _limit(request)
    if "sleep" in request:
        time.sleep(request["sleep"])
    if "defect" in request:
        raise RuntimeError("a defect, as asked for")
    if "stop" in request:
        stage, number = request["stop"]
        _wrap(work, METHODS[stage], after=lambda: os.kill(os.getpid(), number))
    if "pause" in request:
        stage, marker = request["pause"]
        _wrap(work, METHODS[stage], after=lambda: (Path(marker).touch(), time.sleep(120)))
    if "stop_publishing" in request:
        _stop_publishing(request["cache"])
    if "stop_measuring" in request:
        _stop_measuring(request["stop_measuring"])
    if "user" in request:
        os.setgid(request["user"])
        os.setuid(request["user"])


def _limit(request: dict[str, Any]) -> None:
    if "seconds" in request:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(request["seconds"])
    if "kill_after" in request:
        pid = os.getpid()
        end = lambda: (time.sleep(request["kill_after"]), os.kill(pid, signal.SIGKILL))  # noqa: E731
        threading.Thread(target=end, daemon=True).start()
    if "room" in request:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + request["room"],) * 2)
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)


def _stop_publishing(cache: str) -> None:
    rename = Path.rename

    def stopped(self: Path, target: Any) -> Path:
        if ".partial-" in self.name and "tmp" not in self.suffix and not str(self).startswith(cache):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = stopped  # type: ignore[method-assign]


def _stop_measuring(number: int) -> None:
    from deploy.sensitivity import Laboratory

    left = iter(range(number - 1, -1, -1))
    _wrap(Laboratory, "_measured", after=lambda: next(left) or os.kill(os.getpid(), signal.SIGKILL))


def _wrap(work: Any, name: str, after: Any) -> None:
    real = getattr(work, name)

    def wrapped(*arguments: Any) -> Any:
        result = real(*arguments)
        after()
        return result

    setattr(work, name, wrapped)


if __name__ == "__main__":
    serve()
