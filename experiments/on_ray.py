"""The grid on a Ray cluster: a task for each stage that others wait for, and one that ends a cell.

No disk is shared. What a task has made goes through Ray's object store to those that need it, and only the process that began
the grid writes cells' files. A task whose worker is lost is done again; what it had finished lies in that machine's --work.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from functools import cache
from pathlib import Path

import experiments
from experiments.profiles import PROFILES, Cell
from experiments.reproduce import NO_POLICY, Places, do, guides, made, model_folder, out_folder, result_file, stages, zero_shot
from pyargs import files
from pyargs.errors import PyargsError, extra

with extra("ray", "the grid on Ray"):
    import ray

GIB = 2**30
WEIGHTS = 3  # memory of a task in weights of policy and backbone, which are read, packed, and run on
SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB])\b", re.IGNORECASE)


def run_all(todo: list[Cell], places: Places, bar, address: str | None) -> dict[Cell, BaseException]:
    """Runs the cells on the cluster; returns those that failed. Raises PyargsError where the cluster lacks what they need."""
    from pyargs.ray import KILLED, connect, gpus, packed, result, unpack

    if not todo:
        return {}
    connect(address, py_modules=[str(Path(experiments.__file__).parent)])
    profile = todo[0].profile
    if PROFILES[profile].get("gpus") and not gpus():
        raise PyargsError(
            f"a cell of profile {profile} needs a GPU, and the cluster has none. Fix: another cluster, or profile"
        )
    places = Places(*(Path(one).resolve() for one in places))
    least = min(int(cpus) for node in ray.nodes() if node["Alive"] and (cpus := node["Resources"].get("CPU")))
    threads = max(1, least // PROFILES[profile]["workers"])
    began: dict[tuple, ray.ObjectRef] = {}

    @cache
    def data(name: str):
        settings = PROFILES[profile]["sets"][name]
        if "build" in settings:
            return ray.put(packed(Path(settings["data"][1].format(work=places.work)), places.work))
        source = settings["needs"] and Path(settings["needs"].format(shared=places.shared))
        return ray.put(
            {f"shared/{name}": content for name, content in packed(source, places.shared).items()} if source else {}
        )

    def task(function, cell: Cell, *args):
        more = {**needs(cell, threads), "max_retries": KILLED}
        if args and args[0] == "decode":  # its own workers have an engine each
            more |= {"num_cpus": 0, "num_gpus": 0, "memory": GIB}
        return ray.remote(**more)(function).remote(cell, places, threads, data(cell.set), *args)

    def before(cell: Cell, last: str | None = None) -> list:
        """References to the files that the cell's stages before `last` have made, in their order."""
        if cell.row in NO_POLICY:
            return []
        of = cell._replace(row="Global RM") if cell.row == "ARGS, weight 0" else cell
        steps = [(of, "adapt"), *((cell, stage) for stage in stages(cell, places) if stage in ("tune", "decode"))]
        found = []
        for one, stage in steps:
            at = (model_folder(one, places) if stage == "adapt" else out_folder(one, places)), stage
            if at not in began:
                began[at] = task(make, one, stage, *found)
            found.append(began[at])
            if stage == last:
                break
        return found

    def end(cell: Cell):
        compared = cell.settings()["decode"] is not None and guides(cell)
        return task(finish, cell, *(before(zero_shot(cell), "decode") if compared else ()), *before(cell))

    cells, failed, stages_done = {end(cell): cell for cell in todo}, {}, 0
    running = [*began.values(), *cells]
    while running:
        (done,), running = ray.wait(running, num_returns=1)
        if done not in cells:
            stages_done += 1
            bar.set_postfix(stages=f"{stages_done}/{len(began)}")
            continue
        cell = cells[done]
        try:
            files.write_json(result_file(cell, places), result(done))
            for made_by in before(cell):  # `artefacts` looks for the models here
                unpack(result(made_by), places.work)
        except Exception as error:
            failed[cell] = error
            bar.write(f"failed: {cell.name()}: {type(error).__name__}: {error}", file=sys.stderr)
        bar.update()
    return failed


def needs(cell: Cell, threads: int) -> dict:
    """What a cell's tasks need of a machine, as Ray has it: CPUs, GPUs, and bytes of memory, by the sizes in models' names."""
    profile = PROFILES[cell.profile]
    names = () if cell.row in NO_POLICY else (cell.policy, cell.settings()["backbone"])
    millions = [float(n) * (1000 if unit in "Bb" else 1) for name in names for n, unit in SIZE.findall(name)]
    weights = sum(millions) * 10**6 * (4 if profile["dtype"] == "float32" else 2)
    gpus = 0 if cell.row in NO_POLICY else profile.get("gpus", 0)
    return {"num_cpus": threads, "num_gpus": gpus, "memory": int(GIB + WEIGHTS * weights)}


# -- on a worker -------------------------------------------------------------------------------------------------------


def make(cell: Cell, places: Places, threads: int, data: dict, last: str, *before: dict) -> dict:
    """Runs the cell's stages up to `last`; returns their files."""
    from pyargs.ray import packed

    with at_work(cell, places, threads, data, *before) as here:
        each = needs(cell, threads)
        on = ["--on", "ray", "--num-cpus", str(each["num_cpus"]), "--num-gpus", str(each["num_gpus"])]
        do(cell, here, last, decode_on=on)
        found = packed(out_folder(cell, here), here.work)
        return {**packed(model_folder(cell, here), here.work), **found} if last == "adapt" else found


def finish(cell: Cell, places: Places, threads: int, data: dict, *before: dict) -> dict:
    """Runs what is left of the cell; returns the content of its file."""
    with at_work(cell, places, threads, data, *before) as here:
        return made(cell, here)


@contextlib.contextmanager
def at_work(cell: Cell, places: Places, threads: int, *before: dict):
    """The places of this machine, with all files that were made before; output goes to a log of the cell."""
    import torch

    from pyargs.ray import unpack

    torch.set_num_threads(threads)
    here = places._replace(shared=places.work / "shared")
    for several in before:
        own = out_folder(cell, here).relative_to(here.work) if cell.row not in NO_POLICY else None
        unpack({name: content for name, content in several.items() if not _of_others(name, own)}, here.work)
    log = places.work / "logs" / f"{result_file(cell, places).relative_to(places.results).with_suffix('.txt')}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream, contextlib.redirect_stderr(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield here


def _of_others(name: str, own: Path | None) -> bool:
    """Whether these are the seconds of another cell, which its own tasks write."""
    return Path(name).name == "seconds.json" and Path(name).parent != own
