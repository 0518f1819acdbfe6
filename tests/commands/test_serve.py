"""`pyargs serve`: a process that answers, and ends what it has begun when it is told to end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
import serving
from verbs import call

from pyargs.cli import parse
from pyargs.commands.serve import application
from pyargs.decode.engine import Engine
from pyargs.decode.request import numbered


@pytest.fixture(scope="module")
def model(lm_folder, tmp_path_factory):
    """The folder of a reward model."""
    policy, model = serving.pair(lm_folder)
    model.about |= {"method": "lore", "fields": {}, "backbone": lm_folder, "dtype": "float32"}
    folder = tmp_path_factory.mktemp("served") / "lore"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def process(model, lm_folder):
    """(the process, its address)"""
    words = [sys.executable, "-m", "pyargs.cli", "serve", model, "--policy", lm_folder, "--port", "0", "--max-rows", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"serving lore \(\w+\) at (http\S+)", line):
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield process, found[1]
    process.kill()
    process.wait()


def test_it_answers_and_ends_what_it_has_begun(process, model, lm_folder):
    process, address = process
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        wish = dict(model="lore", messages=serving.messages("Hello you"), user="ann", seed=3, max_tokens=150)
        stream = client.chat.completions.create(**wish, stream=True)
        text = next(iter(stream)).choices[0].delta.content
        process.send_signal(signal.SIGTERM)
        text += "".join(part.choices[0].delta.content or "" for part in stream)
    assert process.wait(60) == 0
    engine = Engine(lm_folder, model)
    asked = dict(seed=[numbered(3, 0)], temperature=1.0, max_new_tokens=150)
    assert text == engine.generate([serving.messages("Hello you")], ["ann"], **asked)[0].text


def test_without_a_model_the_policy_answers_alone(lm_folder):
    app = application(parse("serve", ["--policy", lm_folder])[1])
    try:
        with serving.served(app) as address, serving.client(address) as client:
            name = client.models.list().data[0].id
            wish = dict(model=name, messages=serving.messages("Hello you"), temperature=0, max_tokens=12)
            answer = client.chat.completions.create(**wish).choices[0]
    finally:
        app.state.worker.stop()
    assert name == Path(lm_folder).name and answer.pyargs["rewards"] is None
    want = Engine(lm_folder, None).generate([serving.messages("Hello you")], temperature=0, max_new_tokens=12)
    assert answer.message.content == want[0].text


def test_without_anything_to_serve_it_says_so_at_once(capsys):
    assert "--policy" in call(capsys, ["serve"], expect=1)


def test_users_who_come_need_a_model(lm_folder, tmp_path, capsys):
    said = call(capsys, ["serve", "--policy", lm_folder, "--users", str(tmp_path / "users.sqlite")], expect=1)
    assert "a policy alone" in said and not (tmp_path / "users.sqlite").exists()


def test_without_keys_it_is_for_this_machine_alone(model, lm_folder, capsys):
    assert "for this machine alone" in call(capsys, ["serve", model, "--policy", lm_folder, "--host", "0.0.0.0"], expect=1)


def test_replicas_are_on_a_cluster(model, lm_folder, capsys):
    words = ["serve", model, "--policy", lm_folder, "--replicas", "2"]
    assert "add --on ray" in call(capsys, words, expect=1)
