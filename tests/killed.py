"""Commands in processes of their own, with faults: killed by signal 9 at a change of a file or after some time, or refused
files, memory or room by the system.

This file is also the program that starts them. It imports once what they need, computes nothing, and forks for each. So a
command takes no second, and still has nothing of another's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "shutil.rmtree")
NEEDED = """
torch transformers transformers.trainer transformers.models.llama.modeling_llama accelerate datasets peft
safetensors.torch sentence_transformers rouge_score.rouge_scorer pyarrow.parquet filelock pyargs pyargs.learn
pyargs.cli pyargs.decode.pair pyargs.lm.embed pyargs.methods.lore pyargs.prepare pyargs.prepare.preferences
pyargs.prepare.folder pyargs.tune pyargs.metrics.overlap pyargs.metrics.win_rate pyargs.metrics.perplexity
pyargs.data.synthetic pyargs.lm.stack pyargs.commands.data pyargs.commands.train pyargs.commands.tune
pyargs.commands.adapt pyargs.commands.decode pyargs.commands.evaluate pyargs.serve.app uvicorn
torch.optim.adamw sklearn.feature_extraction.text
"""


class Ended(NamedTuple):
    """code: the exit code, or minus the signal; changes: (event, path), in order; text: stdout and stderr."""

    code: int
    changes: list[tuple[str, str]]
    text: str

    @property
    def result(self) -> dict:
        """What it printed."""
        return json.JSONDecoder().raw_decode(self.text, self.text.index("\n{\n") + 1)[0]


class Commands:
    """Starts commands of `pyargs`; an own Python process, with this seed of its hashes. environment: more variables."""

    def __init__(self, hash_seed: int, **environment: str):
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"}
        own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], env={**os.environ, **own, **environment}, **pipes)

    def __call__(self, folder: Path, words: list[str], **fault) -> Ended:
        """Runs `pyargs WORDS` in a folder, whose `cache` is its cache. A fault is one of

        change=N: killed before its N-th change of a file; seconds=S: killed after them; file_bytes=N: no file can be longer,
        as on a full disk; more_memory=N: no more bytes than it has at the start and these; read_only=True: root has no right
        to write where a mode forbids it."""
        code, text = self._ask({"folder": str(folder), "words": words, **fault})
        found = re.findall(r"\n@(\S+) (.*)\n", text)
        return Ended(code, found, re.sub(r"\n@\S+ .*\n", "", text))

    def begin(self, folder: Path, words: list[str], log: Path) -> int:
        """Starts `pyargs WORDS` and leaves it alone; its process's number. log: a file for what it prints."""
        return self._ask({"folder": str(folder), "words": words, "log": str(log)})

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, job: dict):
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def killed_at(number: int, work) -> bool:
    """Does `work` in a copy of this process that is killed before its n-th change of a file; False if it came through."""
    child = os.fork()
    if child == 0:
        try:
            watched(lambda count, *_: count == number and os.kill(os.getpid(), signal.SIGKILL))
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status != 0


def watched(tell) -> None:
    """Calls tell(how many there were before, event, path) before each change of a file, for as long as this process lives.

    path: what is changed; of a move, where to."""
    count = 0

    def watch(event, arguments):
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and not isinstance(arguments[0], int):
            number, count = count, count + 1
            tell(number, event, os.fsdecode(arguments[event == "os.rename"]))

    sys.addaudithook(watch)


# -- the program -------------------------------------------------------------------------------------------------------


def serve() -> None:
    """A line of JSON in for each command; a line with its exit code and its text out, or with its number where it goes on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in NEEDED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def answer(job: dict) -> tuple[int, str] | int:
    if "log" in job:
        write = os.open(job["log"], os.O_WRONLY | os.O_CREAT, 0o600)
        child = forked(job, write)
        os.close(write)
        return child
    read, write = os.pipe()
    child = forked(job, write)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, job.get("seconds", 120))
    with os.fdopen(read, errors="replace") as text:
        said = text.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def forked(job: dict, output: int) -> int:
    """The number of a process that does the job; output: of its file or pipe."""
    if child := os.fork():
        return child
    code = 70
    try:
        os.dup2(output, 1), os.dup2(output, 2)
        code = do(job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def do(job: dict) -> int:
    from pyargs import cli

    os.chdir(job["folder"])
    os.environ["PYARGS_CACHE"] = "cache"
    sys.stdin = io.StringIO()

    def tell(number: int, event: str, path: str) -> None:
        if number == job.get("change"):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(1, f"\n@{event} {os.path.relpath(path)}\n".encode())

    watched(tell)
    if "file_bytes" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
    if "more_memory" in job:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + job["more_memory"],) * 2)
    if job.get("read_only"):
        without_privileges()
    sys.stdout.write("\n")
    return cli.main(job["words"])


def without_privileges() -> None:
    """Root no longer writes where a mode forbids it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    serve()
