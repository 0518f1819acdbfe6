"""The paper's grid, profile by profile: every row x seed x policy x data set, in stages that are not repeated.

    python -m experiments reproduce PROFILE [--only ROW ...] [--sets SET ...] [--seeds N ...] [--dry-run]

A cell is one row, seed and policy on one data set. Its stages are `pyargs train`, `adapt`, `tune`, `decode`, `evaluate`, whose
files are in --work; its numbers and generations, without any text of the data, go to --results as one JSON file, which is made
again only if its settings or its data change. A killed run continues: at most one stage of each worker is lost. --dry-run
prints the cells with their sizes and an estimate of the hours, and begins nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from experiments import estimate, rules
from experiments.profiles import PROFILES, Cell, cells
from experiments.results import name as name_of
from experiments.results import slug
from pyargs import cli, data, files
from pyargs.errors import PyargsError
from pyargs.lm import hub
from pyargs.training import hooks

HERE = Path(__file__).parent
NO_POLICY = {"word overlap", "MiniLM cosine"}  # rows that score texts
QUOTED = 8  # words in a row from the data that make an answer the authors' text rather than ours


class Places(NamedTuple):
    shared: Path
    work: Path
    results: Path


# -- stages ----------------------------------------------------------------------------------------------------------------


def model_folder(cell: Cell, places: Places) -> Path:
    """The folder of the row's model. A reward model is trained once for all policies, ICL needs a model for each policy.

    Like that of `out_folder`, its name depends on the settings: with other settings the stages begin in another folder.
    """
    settings = cell.settings()
    row = recipe(cell)
    backbone = cell.policy if row[0] == "icl" else settings["backbone"]
    made = files.short_hash(
        [rules.NEWEST, row, backbone, PROFILES[cell.profile]["dtype"], settings["data"], settings.get("build")]
    )
    return places.work / cell.profile / cell.set / slug(backbone) / f"{slug(cell.row)}-{cell.seed}-{made}"


def out_folder(cell: Cell, places: Places) -> Path:
    made = files.short_hash([wanted(cell), cell.settings()["data"], cell.settings().get("build")])
    return places.work / cell.profile / cell.set / slug(cell.policy) / f"{slug(cell.row)}-{cell.seed}-{made}"


def data_argv(cell: Cell, places: Places) -> list[str]:
    return [word.format(shared=places.shared, work=places.work) for word in cell.settings()["data"]]


def stages(cell: Cell, places: Places) -> dict[str, list[str]]:
    """The cell's commands: stage -> arguments of `pyargs`."""
    settings, profile = cell.settings(), PROFILES[cell.profile]
    argv, out = data_argv(cell, places), out_folder(cell, places)
    policy = ["--policy", cell.policy, "--dtype", profile["dtype"]]
    method, fields = settings["rows"][cell.row] or (None, {})
    ranks_only = method == "pal" and not guides(cell)
    answers, generates = out / "answers.jsonl", settings["decode"] is not None and not ranks_only
    measures = ["--generations", str(answers), "--bertscore", settings["bertscore"]] if generates else []
    if cell.row == "ARGS, weight 0":  # any reward model: its rewards do not count
        model = str(model_folder(cell._replace(row="Global RM"), places) / "model")
        policy += ["--reward-weight", "0", *argv]
        found = {"decode": ["decode", model, *policy, *settings["decode"], "--out", str(answers)]} if generates else {}
        return {**found, "evaluate": ["evaluate", model, *policy, *measures, "--out", str(out / "result.json")]}
    folder = model_folder(cell, places)
    seen, model = str(folder / "seen"), str(folder / "model")
    backbone = cell.policy if method == "icl" else settings["backbone"]
    fields = {"backbone": backbone, "dtype": profile["dtype"], "seed": cell.seed, **fields}
    found = {
        "train": ["train", method, *argv, *flags(fields), "--out", seen],
        "adapt": ["adapt", seen, *argv, "--out", model],
    }
    if guides(cell):
        found["tune"] = ["tune", model, *policy, *argv, *settings["tune"], "--out", str(out / "tune.json")]
        policy += ["--tuned", str(out / "tune.json")]
    else:
        policy = []
    if generates:
        found["decode"] = ["decode", model, *policy, *argv, *settings["decode"], "--out", str(answers)]
        if guides(cell):
            measures += ["--zero-shot", str(out_folder(zero_shot(cell), places) / "answers.jsonl")]
    found["evaluate"] = ["evaluate", model, *policy, *argv, *measures, "--out", str(out / "result.json")]
    return found


def guides(cell: Cell) -> bool:
    """Whether the row's rewards guide a policy: not PAL-B's, which ranks only, nor a row that answers by itself."""
    method, fields = cell.settings()["rows"][cell.row] or (None, {})
    return method not in (None, "icl", "pdpo") and (method, fields.get("variant", "B")) != ("pal", "B")


def flags(fields: dict) -> list[str]:
    argv = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        argv += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return argv


def zero_shot(cell: Cell) -> Cell:
    return cell._replace(row="Zero-Shot", seed=PROFILES[cell.profile]["seeds"][0])


def command(verb: str, *argv: str) -> dict:
    """`pyargs VERB WORDS` in this process."""
    run_verb, args = cli.parse(verb, list(argv))
    return run_verb(args)


def do(cell: Cell, places: Places, last: str | None = None, decode_on: Sequence[str] = ()) -> dict[str, float]:
    """Runs the cell's stages up to `last` (default: all), without those that are done; returns the seconds of each.

    decode_on: words that tell `pyargs decode` where to compute, which changes no answer.
    """
    out = out_folder(cell, places)
    out.mkdir(parents=True, exist_ok=True)
    noted = out / "seconds.json"
    seconds = files.read_json(noted) if noted.exists() else {}
    for stage, (verb, *argv) in stages(cell, places).items():
        lock = model_folder(cell, places) if stage in ("train", "adapt") else out
        lock.mkdir(parents=True, exist_ok=True)
        with FileLock(lock / f".{stage}.lock"):  # a model serves several cells
            started = time.perf_counter()
            print(f"\n== {cell.name()}: pyargs {verb} {' '.join(argv)}", file=sys.stderr, flush=True)
            if not command(verb, *argv, *(decode_on if stage == "decode" else ())).get("already_done"):
                seconds[stage] = round(time.perf_counter() - started, 1)
                files.write_json(noted, seconds)
        if stage == last:
            break
    return seconds


def prepare(name: str, profile: str, places: Places) -> bool:
    """Builds the set if needed; False if its data are not here."""
    settings = PROFILES[profile]["sets"][name]
    places_of = {"shared": places.shared, "work": places.work}
    built = Path(settings["data"][1].format(**places_of))
    source = settings["needs"] and Path(settings["needs"].format(**places_of))
    if source and not source.exists():
        if "build" in settings and (built / "dataset.json").exists():
            return True  # built elsewhere, and brought here without its source
        print(f"{name}: no data at {source}: skipped", file=sys.stderr)
        return False
    if "build" in settings:
        command(*build_argv(settings, places))
    return True


def build_argv(settings: dict, places: Places) -> list[str]:
    """Arguments of the `pyargs` command that builds a set."""
    of = {"shared": places.shared, "work": places.work}
    return ["data", "build", *(word.format(**of) for word in settings["build"]), "--out", settings["data"][1].format(**of)]


# -- cells -----------------------------------------------------------------------------------------------------------------


def result_file(cell: Cell, places: Places) -> Path:
    return places.results / name_of(cell._asdict())


@cache
def dataset_hash(argv: tuple[str, ...]) -> str:
    return data.content_hash(load(argv))


def load(argv):
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    return data.load(options["--data"], options.get("--source"))


def recipe(cell: Cell) -> list | None:
    """The row's method and all of its fields, with defaults: a changed setting makes another cell."""
    row = cell.settings()["rows"][cell.row]
    return None if row is None else [row[0], asdict(hooks.method(row[0]).Config(**row[1]))]


def wanted(cell: Cell) -> dict:
    """The settings that the cell's numbers depend on."""
    settings = cell.settings()
    compared = settings["decode"] is not None and guides(cell)
    return {
        "recipe": rules.NEWEST,
        "row": recipe(cell),
        "dtype": PROFILES[cell.profile]["dtype"],
        **{name: settings.get(name) for name in ("stands_for", "about", "tune", "decode", "bertscore")},
        "compared_with": recipe(zero_shot(cell)) if compared else None,
    }


def key(cell: Cell, places: Places, built: bool = True) -> dict:
    """What the cell's numbers depend on: settings (without places), data (if they are built), models."""
    settings = cell.settings()
    found = {
        **wanted(cell),
        "data": dataset_hash(tuple(data_argv(cell, places))) if built else None,
        "models": [hub.identity(settings["backbone"]), hub.identity(cell.policy)],
    }
    return json.loads(json.dumps(found))


def written(cell: Cell, places: Places) -> dict:
    """The content of the cell's file; empty if it is missing or damaged."""
    file = result_file(cell, places)
    try:
        found = files.read_json(file) if file.exists() else {}
    except PyargsError:
        return {}
    whole = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in ("key", "values"))
    whole = whole and isinstance(found["key"].get("recipe"), int)
    whole = whole and all(isinstance(found.get(name, {}), dict) for name in ("seconds", "tune", "fields"))
    return {**found, **cell._asdict()} if whole else {}


def stale(cell: Cell, places: Places, built: bool = True) -> list[str] | None:
    """Why an existing cell has to be made again, empty if it need not. None for a missing cell.

    Reasons are other settings, other data (if they are built), and rules that came after it.
    """
    found = written(cell, places)
    if not found:
        return None
    own, now = found["key"] if built else {**found["key"], "data": None}, key(cell, places, built)
    own = {name: completed(value, now.get(name)) if name in ("row", "compared_with") else value for name, value in own.items()}
    others = [name for name in {**now, **own} if name != "recipe" and own.get(name) != now.get(name)]
    return [f"other {name}" for name in others] + [f"older rule: {rule.before}" for rule in rules.older(found)]


def completed(noted, now):
    """The recipe of an older cell, completed with later fields; their defaults are what was done before."""
    recipes = all(isinstance(one, list) and len(one) == 2 and isinstance(one[1], dict) for one in (noted, now))
    if not recipes or noted[0] != now[0]:
        return noted
    later = {name: value for name, value in asdict(hooks.method(noted[0]).Config()).items() if name in now[1]}
    return [noted[0], {**json.loads(json.dumps(later)), **noted[1]}]


def done(cell: Cell, places: Places, built: bool = True) -> bool:
    """Whether the cell's file exists with these settings and data, and no later rule touches it."""
    return stale(cell, places, built) == []


def run(cell: Cell, places: Places) -> dict:
    """Runs the missing stages of a cell and writes its file."""
    found = made(cell, places)
    files.write_json(result_file(cell, places), found)
    return found


def made(cell: Cell, places: Places) -> dict:
    """Runs the missing stages of a cell; returns the content of its file."""
    settings = cell.settings()
    found = {
        **cell._asdict(),
        "stands_for": settings["stands_for"],
        "data": settings["about"],
        "backbone": settings["backbone"],
        "dtype": PROFILES[cell.profile]["dtype"],
    }
    method, fields = settings["rows"][cell.row] or (None, {})
    found |= {"method": method, "fields": fields}
    if cell.row in NO_POLICY:
        found |= {"values": {"rm_accuracy": blind(cell, places)}, "provenance": files.provenance(cell.seed)}
    else:
        if cell.row == "ARGS, weight 0":
            do(cell._replace(row="Global RM"), places, last="adapt")
        elif settings["decode"] is not None and guides(cell):
            do(zero_shot(cell), places, last="decode")
        seconds, out = do(cell, places), out_folder(cell, places)
        result = files.read_json(out / "result.json")
        values, answers = result["values"], result["values"].pop("answers", None)
        if cell.row == "ARGS, weight 0":
            values = {
                "policy_accuracy": {"weight_0": values["policy_accuracy"]["weight_0"]},
                **{name: value for name, value in values.items() if name in ("reward_weight", "generations")},
            }
        found |= {"values": values}
        if (out / "tune.json").exists():
            found["tune"] = {name: value for name, value in files.read_json(out / "tune.json").items() if name != "model"}
            values["relative"] = found["tune"]["relative"]
        if answers is not None:
            found["answers"] = [without_quotation(answer) for answer in answers]
        found |= {"seconds": seconds, "provenance": result["provenance"]}
    found["provenance"] = {name: value for name, value in found["provenance"].items() if name != "command"}
    found["key"] = key(cell, places)
    return found


def without_quotation(answer: dict) -> dict:
    """The answer, without its text if it repeats much of its sources or a whole title: then only numbers and a digest stay."""
    kept = {name: value for name, value in answer.items() if name != "quotes"}
    quotes = answer["quotes"] or answer["copied"] >= min(QUOTED, max(answer["words"], 1))
    return {**kept, "text": None} if quotes else kept


def blind(cell: Cell, places: Places) -> dict:
    """RM accuracy of a scorer that knows neither the user nor language (`metrics.blind`)."""
    import torch

    from pyargs.lm.embed import embed
    from pyargs.metrics.blind import contents, overlap
    from pyargs.metrics.rm_accuracy import rm_accuracy

    rows = data.of_split(load(data_argv(cell, places)), "query")
    prompts, sides = contents(rows["prompt"][:]), (rows["chosen"][:], rows["rejected"][:])
    if cell.row == "word overlap":
        scores = [[overlap(prompt, response) for prompt, response in zip(prompts, side, strict=True)] for side in sides]
    else:
        prompt = embed("minilm", prompts)
        scores = [(prompt * embed("minilm", side)).sum(1).tolist() for side in sides]
    return rm_accuracy(torch.tensor(scores).T, rows["user_id"])


# -- the plan ---------------------------------------------------------------------------------------------------------------


def size(cell: Cell, places: Places) -> dict:
    """Sizes of the cell's set; of a missing set as they were once counted, if they were."""
    try:
        return estimate.sizes(load(data_argv(cell, places)))
    except PyargsError as error:
        settings = cell.settings()
        words = f"is built first: pyargs {' '.join(build_argv(settings, places))}" if "build" in settings else ""
        if settings["needs"] and not (source := Path(settings["needs"].format(shared=places.shared))).exists():
            words = f"no data at {source}: the run skips this set until they are there"
        found = {"not there yet": words or str(error)}
        if "counted" in settings:
            found |= estimate.counted(files.read_json(HERE / "results/data_statistics.json")["sets"][settings["counted"]])
        return found


def plan(asked: list[Cell], places: Places, workers: int) -> dict:
    """The remaining cells, with sizes and the time that they would take (`estimate.plan`)."""
    sizes, left, finished = {}, [], 0
    taken: dict[tuple, list[float]] = {}
    sets = {cell.set for cell in asked}
    for cell in (cell for cell in cells(asked[0].profile) if cell.set in sets):  # rows that are not asked for tell the rates
        if seconds := written(cell, places).get("seconds"):
            taken.setdefault((cell.set, cell.row), []).append(sum(seconds.values()))
    for cell in asked:
        if cell.set not in sizes:
            sizes[cell.set] = size(cell, places)
        known, settings = "pairs" in sizes[cell.set], cell.settings()
        why = stale(cell, places, built="not there yet" not in sizes[cell.set])
        if why == []:
            finished += 1
            continue
        count = estimate.tokens(settings["rows"][cell.row], settings, sizes[cell.set]) if known else None
        steps = () if cell.row in NO_POLICY else stages(cell, places)
        same = taken.get((cell.set, cell.row))
        seconds = sum(same) / len(same) if same else None
        row = settings["rows"][cell.row]
        trained, again = estimate.trains(row), tuple(why or ())
        left.append(estimate.Left(cell.name(), tuple(steps), trained, count if steps else 0, seconds, again))
    measured = []
    for (name, row), seconds in taken.items():
        if "pairs" in sizes[name]:
            settings = PROFILES[asked[0].profile]["sets"][name]
            of = settings["rows"][row]
            measured.append((estimate.trains(of), estimate.tokens(of, settings, sizes[name]), sum(seconds) / len(seconds)))
    return {"done": finished, "sets": sizes, **estimate.plan(left, measured, workers)}
