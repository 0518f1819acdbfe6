"""Small files in the layouts that the data sets read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pyargs.prepare import tldr

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
CI = SHARED / "pref_lamp_like" / "ci"
needs_shared = pytest.mark.skipif(not CI.is_dir(), reason="the data pack ../shared/data is not here")


def row(**changes) -> dict:
    """A preference row; a value of ... leaves the column out."""
    base = {"user": "u1", "split": "train", "role": "train", "prompt": "p", "chosen": "good", "rejected": "bad"}
    return {name: value for name, value in (base | changes).items() if value is not ...}


def said(*turns: str) -> list[dict]:
    """A conversation; the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def write(path: Path, rows: list[dict]) -> Path:
    """JSON Lines, gzipped if the name says so."""
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def lamp(folder: Path, users: dict[str, tuple[str, int]] | None = None, *, gz: bool = False, change=None) -> Path:
    """LaMP-5: users {id: ("train" or "dev", papers in the profile)}; `change(questions, golds)` spoils a file's content."""
    users = users or {"1": ("train", 1), "2": ("train", 1), "3": ("dev", 1)}
    folder.mkdir(parents=True, exist_ok=True)

    def paper(user: str, number: int) -> dict:
        item = f"{user}{number}"
        return {"id": item, "title": f"Title {item}", "abstract": f"About {item}.", "date": 2010 + number}

    for stem in ("train", "dev"):
        mine = {user: count for user, (kind, count) in users.items() if kind == stem}
        questions = [
            {
                "id": user,
                "input": f"Generate a title for the following abstract of a paper: About {user}.",
                "profile": [paper(user, number) for number in range(count)],
            }
            for user, count in mine.items()
        ]
        golds = [{"id": user, "output": f"Title {user}"} for user in mine]
        if change is not None and stem == "train":
            change(questions, golds)
        for name, content in (("questions", questions), ("outputs", {"task": "LaMP_5", "golds": golds})):
            text = json.dumps(content).encode()
            path = folder / f"{stem}_{name}.json{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(text) if gz else text)
    return folder


def comparison(
    worker: str, split: str = "train", *, texts=(" a longer summary", " short"), number: int = 0, **changes
) -> dict:
    """A row of the TL;DR comparisons; `policy`, `post` change what they name."""
    policy = changes.get("policy", "sup2")
    return {
        "info": {"id": f"t3_{number}", "post": changes.get("post", f"Post {number} of {worker}."), "title": "T"},
        "split": split,
        "summaries": [{"text": text, "policy": policy, "note": None} for text in texts],
        "choice": 0,
        "worker": worker,
        "batch": "batch3",
        "extra": {"confidence": 2},
    }


def conversation(name: str, user: str, turns: int = 2, *, replies: int = 3, text: str = "") -> dict:
    """A conversation of PRISM: the first reply of each turn is the chosen one."""
    history = []
    for turn in range(turns):
        history.append({"turn": turn, "role": "user", "content": f"{name} asks {turn}{text}"})
        history += [
            {
                "turn": turn,
                "role": "model",
                "content": f"{name} reply {turn}-{i}",
                "if_chosen": i == 0,
                "within_turn_id": i,
                "score": 50,
                "model_name": "m",
            }
            for i in range(replies if turn == 0 else 2)
        ]
    return {"conversation_id": name, "user_id": user, "conversation_turns": turns, "conversation_history": history}


def prism(folder: Path, dialogues: dict[str, int], change=None) -> Path:
    """PRISM with so many dialogues of each user, and one user who only answered the survey."""
    survey = [{"user_id": user, "num_completed_conversations": count} for user, count in dialogues.items()]
    survey.append({"user_id": "survey_only", "num_completed_conversations": 0})
    conversations = [conversation(f"{user}-{i}", user) for user, count in dialogues.items() for i in range(count)]
    if change is not None:
        change(survey, conversations)
    write(folder / "survey.jsonl", survey)
    write(folder / "conversations.jsonl", conversations)
    return folder


def tldr_source(folder: Path) -> Path:
    """30 train rows of each train worker, 6 validation rows of every worker, and rows that must go."""
    rows = [comparison(w, texts=(f" {w} {i} long", f" {i}"), number=i) for w in tldr.TRAIN_WORKERS for i in range(30)]
    rows += [
        comparison(w, split="valid1" if i % 2 else "valid2", texts=(f" {w} {i} v", f" v{i}"), number=100 + i)
        for w in (*tldr.TRAIN_WORKERS, *tldr.NEW_WORKERS)
        for i in range(6)
    ]
    rows += [comparison(tldr.TRAIN_WORKERS[0], policy=policy) for policy in ("sup4_ppo_rm3", "ref", "sup_cnn")]
    rows += [comparison(tldr.TRAIN_WORKERS[0], texts=(" same", " size"), number=7), comparison("somebody else")]
    rows += [comparison(tldr.NEW_WORKERS[5], split="valid1", texts=(" same", " size"), number=200 + i) for i in range(3)]
    rows.append(comparison(tldr.TRAIN_WORKERS[1], post=None))
    for number, part in enumerate((rows[:200], rows[200:]), 3):
        write(folder / "comparisons" / f"batch{number}.json", part)
    (folder / "axis_evals").mkdir()
    (folder / "axis_evals" / "other.json").write_text("no comparison")
    return folder


DIALOGUES = {f"user{i}": 1 + i % 6 for i in range(40)}
"""How many dialogues of PRISM each user has."""
