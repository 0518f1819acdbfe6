"""`pyargs env`, with the extension and without."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys


def test_env_command():
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", "env"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["packages"]["torch"] == importlib.metadata.version("torch")  # without +cu130, where a wheel says so
    assert {"native_ops", "cpu_capability", "cuda", "threads", "extension"} <= set(report)


def test_env_command_without_the_extension():
    env = {**os.environ, "PYARGS_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-m", "pyargs.cli", "env"], capture_output=True, text=True, check=True, env=env)
    report = json.loads(done.stdout)
    assert report["native_ops"] == [] and "PYARGS_NO_EXT" in report["extension"]
