"""`compress serve` as a process of its own, and a tiny model that it can serve for long answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-that-only-tests-know"
LINE = re.compile(r"serving (\S+) at (http://\S+)/v1 \((.*)\)")
FOREVER = {"logit_bias": {"2": -100}}  # id 2 ends an answer of the tiny model


def tiny_gguf(folder: Path, context: int = 32_768, seed: int = 0) -> Path:
    """A random Llama as a file, made for `context` tokens."""
    from compress.formats.gguf import export_gguf
    from compress.teacher import random_teacher

    checkpoint = folder / "checkpoint"
    random_teacher(checkpoint, seed)
    config = json.loads((checkpoint / "config.json").read_text())
    config["max_position_embeddings"] = context
    (checkpoint / "config.json").write_text(json.dumps(config))
    export_gguf(checkpoint, folder / "tiny.gguf", "F16")
    return folder / "tiny.gguf"


class Served:
    """A server that listens; its log is read when it has ended."""

    def __init__(self, *arguments: object, key: str | None = KEY) -> None:
        environment = {name: v for name, v in os.environ.items() if "COMPRESS" not in name}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {"COMPRESS_KEY": key} if key else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "compress", "serve", *map(str, arguments), "--port", "0"]
            + ([] if "--tuning" in arguments else ["--threads", "1"]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        line = self.process.stdout.readline()
        match = LINE.match(line)
        assert match, line + self.process.stderr.read()
        self.model, self.url, self.about = match.groups()

    def get(self, path: str, key: str | None = KEY) -> str:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        return urllib.request.urlopen(request, timeout=10).read().decode()

    def post(self, path: str, body: object, key: str | None = KEY, **headers: str) -> dict:
        """The JSON that a POST gets; of an error its JSON too, with "status"."""
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read()) | {"headers": dict(response.headers)}
        except urllib.error.HTTPError as error:
            body = json.loads(error.read())
            return body | {"status": error.code, "headers": dict(error.headers)}

    def figure(self, name: str) -> float:
        """A figure of /metrics; 0 where it is not there yet."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(name) and (line[len(name)] in " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def until(self, condition, seconds: float = 10.0) -> float:
        """Seconds until a condition holds; an assertion when it does not in time."""
        start = time.perf_counter()
        while not condition():
            assert time.perf_counter() - start < seconds, "it never came true"
            time.sleep(0.02)
        return time.perf_counter() - start

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, the rest of standard output, the log."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, log = self.process.communicate(timeout=60)
        return self.process.returncode, out, log


def entries(log: str, kind: str = "request") -> list[dict]:
    """Lines of a log, of one kind."""
    rows = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [row for row in rows if row["event"] == kind]
