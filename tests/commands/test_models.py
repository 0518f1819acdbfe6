"""`pyargs models`."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_command_line(tmp_path):
    run = [sys.executable, "-m", "pyargs.cli", "models"]
    environment = os.environ | {"PYARGS_CACHE": str(tmp_path / "empty")}
    listed = subprocess.run([*run, "list"], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(listed.stdout)["minilm"]["state"] == "not in the cache"
    wrong = subprocess.run([*run, "fetch", "smollm"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 1 and "smollm2-135m" in wrong.stderr and "Traceback" not in wrong.stderr
    assert subprocess.run([*run], capture_output=True, env=environment).returncode == 2
