"""Every stage of the command line under fire: killed, refused memory or room, twice at once; and twice undisturbed.

Whatever comes between, the files are in the end those of an undisturbed run, to the byte but for seconds and provenance;
what was finished is not done again; nothing temporary is left.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
from killed import Commands

from pyargs.data import synthetic

FEW = "--max-new-tokens 4 --batch-size 4"
STAGES = {
    "build": "data build preferences --source pairs.jsonl --embedder lm --out set",
    "train": "train lore --data set --backbone lm --rank 2 --epochs 1 --batch-size 8 --checkpoint-steps 2 --out seen",
    "tune": f"tune seen --policy lm --data set --prompts 3 --grid 0 1 10 --objective harmonic {FEW} --out tune.json",
    "adapt": "adapt seen --data set --adapt-steps 20 --out model",
    "decode": f"decode model --policy lm --data set --limit 6 {FEW} --out answers.jsonl",
    "evaluate": "evaluate model --policy lm --data set --tuned tune.json --generations answers.jsonl --bertscore lm "
    "--out result.json",
}
OUT = {
    "build": "set",
    "train": "seen",
    "tune": "tune.json",
    "adapt": "model",
    "decode": "answers.jsonl",
    "evaluate": "result.json",
}
FAULTS = {"build": 3, "train": 6, "tune": 3, "adapt": 3, "decode": 3, "evaluate": 2}
"""How often each stage is killed until it may come to its end: 20 in all."""


def stages(*often: str):
    """Each of the stages; those that are not named, in the nightly run alone."""
    return pytest.mark.parametrize("stage", [s if s in often else pytest.param(s, marks=pytest.mark.nightly) for s in STAGES])


OTHERWISE = ("seconds", "tokens_per_second", "provenance")


class Undisturbed:
    """All stages, one after the other, in a folder. before: copies of the folder; runs: how each of them ended."""

    def __init__(self, folder: Path, start: Path, commands: Commands):
        self.commands, self.folder, self.before, self.runs, self.seconds = commands, folder / "all", {}, {}, {}
        shutil.copytree(start, self.folder)
        for stage, words in STAGES.items():
            self.before[stage] = folder / f"before {stage}"
            shutil.copytree(self.folder, self.before[stage])
            begun = time.perf_counter()
            self.runs[stage] = commands(self.folder, words.split())
            self.seconds[stage] = time.perf_counter() - begun
            assert self.runs[stage].code == 0, self.runs[stage].text
        self.after = dict(zip(STAGES, [*map(files, list(self.before.values())[1:]), files(self.folder)], strict=True))


def files(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder, hidden or not; of the cache the names alone, of JSON what is no time and no provenance."""

    def content(path: Path) -> bytes | None:
        if path.is_dir() or "cache" in path.parts:
            return None
        found = path.read_bytes()
        if path.suffix != ".json" or not isinstance(value := json.loads(found), dict):
            return found
        return json.dumps({name: one for name, one in value.items() if name not in OTHERWISE}).encode()

    return {p.relative_to(folder).as_posix(): content(p) for p in sorted(folder.rglob("*"))}


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    synthetic.tiny_lm(folder / "lm", layers=1, width=32, heads=2)
    synthetic.load(users=3, pairs=16, new_users=2, support=5, query=4).to_json(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, start):
    """By a program whose hashes have another seed than those of `commands`."""
    commands = Commands(hash_seed=1)
    yield Undisturbed(tmp_path_factory.mktemp("undisturbed"), start, commands)
    commands.close()


@pytest.fixture(scope="module")
def commands():
    started = Commands(hash_seed=2)
    yield started
    started.close()


@pytest.fixture
def again(undisturbed, tmp_path):
    """again(stage): a fresh folder in which all stages before it are done."""
    numbers = iter(range(1000))
    return lambda stage: Path(shutil.copytree(undisturbed.before[stage], tmp_path / f"{next(numbers)}"))


def complete(folder: Path, stage: str) -> set[str]:
    """What a next run has not to write again: checkpoints that are complete, and the output of a stage that is."""
    found = {one.parent.relative_to(folder).as_posix() for one in folder.glob("*.checkpoints-*/checkpoint-*/complete")}
    record = folder / f"{OUT[stage]}.stage.json"
    return found | ({OUT[stage]} if record.exists() and json.loads(record.read_text())["finished"] else set())


def redone(run, done: set[str]) -> list[str]:
    """What it made although it was there."""
    made = [path for event, path in run.changes if event in ("open", "os.mkdir", "os.rename")]
    return [path for path in made if any(path == one or path.startswith(f"{one}/") for one in done)]


def comes_to_its_end(commands, folder: Path, stage: str, undisturbed) -> None:
    done = complete(folder, stage)
    run = commands(folder, STAGES[stage].split())
    assert run.code == 0, run.text
    assert redone(run, done) == [] and run.result.get("already_done", False) == (OUT[stage] in done)
    same(files(folder), undisturbed.after[stage])


# -- undisturbed -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(undisturbed, commands, start, tmp_path):
    """In processes of their own, with other hashes, in another folder. Done once more, all is done already."""
    other = Undisturbed(tmp_path, start, commands)
    for stage in STAGES:
        same(other.after[stage], undisturbed.after[stage])
    for stage in STAGES:
        comes_to_its_end(commands, other.folder, stage, other) if stage == "evaluate" else None
        assert commands(other.folder, STAGES[stage].split()).result["already_done"]
    same(files(other.folder), undisturbed.after["evaluate"])


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 11))])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_point_it_goes_on(stage, seed, undisturbed, commands, again, record_property):
    """Killed again and again, at a change of a file or at some time, both drawn by the seed; then left alone."""
    rng, folder, killed = random.Random(f"{seed} {stage}"), again(stage), 0
    for _ in range(10 * FAULTS[stage]):
        changes, seconds = len(undisturbed.runs[stage].changes), undisturbed.seconds[stage]
        where = {"change": rng.randrange(changes)} if rng.random() < 0.6 else {"seconds": rng.uniform(0.02, 1.1) * seconds}
        done = complete(folder, stage)
        run = commands(folder, STAGES[stage].split(), **where)
        assert run.code in (0, -9), run.text
        assert redone(run, done) == []
        if run.code == 0:  # it came through: the same again from the start
            same(files(folder), undisturbed.after[stage])
            folder = again(stage)
            continue
        killed += 1
        if killed == FAULTS[stage]:
            break
    assert killed == FAULTS[stage]
    record_property("killed", killed)
    comes_to_its_end(commands, folder, stage, undisturbed)


# -- refused -----------------------------------------------------------------------------------------------------------


def refused(commands, folder: Path, stage: str, undisturbed, message: str, **fault) -> bool:
    """Whether it failed: with one line that says what to do, and no half of a file. Without the fault it comes to its end."""
    before = files(folder)
    run = commands(folder, STAGES[stage].split(), **fault)
    assert run.code in (0, 1), run.text
    if run.code == 0:
        same(files(folder), undisturbed.after[stage])
        return False
    last = run.text.strip().splitlines()[-1]
    assert last.startswith(f"pyargs {STAGES[stage].split()[0]}: ") and message in last and "Traceback" not in run.text, (
        run.text
    )
    for name, content in files(folder).items():  # of a result there is nothing or all
        own = name.startswith((f"{OUT[stage]}.", "cache"))
        assert own or content == (before if name in before else undisturbed.after[stage])[name], name
    comes_to_its_end(commands, folder, stage, undisturbed)
    return True


@stages("tune")
def test_a_full_disk(stage, undisturbed, commands, again):
    """No file can be longer than so many bytes. The least of them is too short for every record."""
    assert refused(commands, again(stage), stage, undisturbed, "Fix: ", file_bytes=300)
    for size in (1500, 6000):
        refused(commands, again(stage), stage, undisturbed, "Fix: ", file_bytes=size)


@stages("adapt")
def test_a_folder_that_can_only_be_read(stage, undisturbed, commands, again):
    folder = again(stage)
    folder.chmod(0o555)
    before = files(folder)
    run = commands(folder, STAGES[stage].split(), read_only=True)
    folder.chmod(0o755)
    assert run.code == 1 and "cannot be" in (last := run.text.strip().splitlines()[-1]) and "Fix: " in last, run.text
    same(files(folder), before)
    comes_to_its_end(commands, folder, stage, undisturbed)


@stages("decode")
def test_memory_that_runs_out(stage, undisturbed, commands, again):
    failed = 0
    for more in (1 << 20, 4 << 20, 16 << 20):
        failed += refused(commands, again(stage), stage, undisturbed, "not enough memory", more_memory=more)
    assert failed


# -- twice at once -----------------------------------------------------------------------------------------------------


@stages("train", "adapt")
def test_two_processes_on_one_folder(stage, undisturbed, commands, again):
    """One of them makes it, or each of them the same; who may not says that another does."""
    folder, words, ends = again(stage), STAGES[stage].split(), []
    both = (commands, undisturbed.commands)
    pair = [threading.Thread(target=lambda one=one: ends.append(one(folder, words))) for one in both]
    [one.start() for one in pair], [one.join() for one in pair]
    for run in ends:
        assert run.code == 0 or (run.code == 1 and "another process is making" in run.text), run.text
    assert any(run.code == 0 for run in ends)
    same(files(folder), undisturbed.after[stage])
