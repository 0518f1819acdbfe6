"""The run of the grid: which cells are asked for, and their missing stages, several cells at a time."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread

from experiments.profiles import PROFILES, Cell, cells
from experiments.reproduce import Places, done, prepare, run
from pyargs.errors import PyargsError, did_you_mean
from pyargs.progress import progress_bar

KILLED = 3  # times that workers may be killed before the cells in hand count as failed


def chosen(profile: str, only: list[str] | None, sets: list[str] | None, seeds: list[int] | None) -> list[Cell]:
    """The profile's cells of these rows, sets and seeds; None: of all. Raises PyargsError if there is no such cell."""
    everything = cells(profile)
    for named, known in ((only, {c.row for c in everything}), (sets, {c.set for c in everything})):
        for name in named or ():
            if name not in known:
                raise PyargsError(f"profile {profile} has no '{name}'.{did_you_mean(name, known)}")
    asked = [c for c in everything if all(not some or one in some for some, one in ((only, c.row), (sets, c.set)))]
    asked = [c for c in asked if seeds is None or c.seed in seeds]
    if not asked:
        has = "; ".join(f"{name}: {', '.join(of['rows'])}" for name, of in PROFILES[profile]["sets"].items())
        seeds_there = PROFILES[profile]["seeds"]
        raise PyargsError(f"no cell of profile {profile} is all of that: its seeds are {seeds_there}, its rows {has}")
    return asked


def run_grid(asked: list[Cell], places: Places, run_cells: Callable) -> dict:
    """Runs the missing cells of one profile; returns how many there are, how many ran now, and the names of failed ones.

    run_cells(cells, places, bar) -> those that failed, with their errors.
    """
    profile = asked[0].profile
    there = {name: prepare(name, profile, places) for name in dict.fromkeys(cell.set for cell in asked)}
    asked = [cell for cell in asked if there[cell.set]]
    todo = [cell for cell in asked if not done(cell, places)]
    (places.work / "logs").mkdir(parents=True, exist_ok=True)
    with progress_bar(total=len(asked), initial=len(asked) - len(todo), desc=profile, unit="cell") as bar:
        failed = run_cells(todo, places, bar)
    for cell, error in failed.items():
        print(f"failed: {cell.name()}: {error}", file=sys.stderr)
    return {"cells": len(asked), "run_now": len(todo) - len(failed), "failed": [c.name() for c in failed]}


def run_here(todo: list[Cell], places: Places, bar, workers: int) -> dict[Cell, BaseException]:
    """Runs cells in processes of this machine. What the others wait for comes first, and alone."""
    first, others = ([c for c in todo if (c.row == "Zero-Shot") == one] for one in (True, False))
    return run_all(first, places, workers, bar) | run_all(others, places, workers, bar)


def shard(asked: list[Cell], number: int, of: int) -> list[Cell]:
    """Part `number` (from 0) of the cells in `of` parts: the same on every machine, whatever is done already there.

    Cells that read one model stay together. Each part computes what its cells need, so that what several parts need (the
    unguided answers, Global RM for weight 0, built data, features) is computed by each of them.
    """
    models = sorted({(cell.set, cell.row, cell.seed) for cell in asked})  # so that the seeds of a row go to different parts
    mine = set(models[number::of])
    return [cell for cell in asked if (cell.set, cell.row, cell.seed) in mine]


def run_all(todo: list[Cell], places: Places, workers: int, bar) -> dict[Cell, BaseException]:
    """Runs the cells, several at a time; returns those that failed. If a worker is killed, new ones continue with the rest."""
    threads, failed, broken = max(1, (os.cpu_count() or 1) // workers), {}, 0
    while todo:
        left, running = [], {}
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=begin_worker, initargs=(threads,)
        ) as pool:
            for cell in todo:
                try:
                    running[pool.submit(worker, cell, places)] = cell
                except BrokenProcessPool:
                    left.append(cell)
            for finished in as_completed(running):
                cell, error = running[finished], finished.exception()
                if isinstance(error, BrokenProcessPool) and broken < KILLED:
                    left.append(cell)
                    continue
                if error is not None:
                    failed[cell] = error
                    bar.write(f"failed: {cell.name()}: {type(error).__name__}: {error}", file=sys.stderr)
                bar.update()
        broken += bool(left)
        todo = left
        if todo:
            bar.write(f"a worker was killed (out of memory?): {len(todo)} cells are tried again", file=sys.stderr)
    return failed


def worker(cell: Cell, places: Places) -> None:
    """Runs one cell in a process of the pool; output of the stages goes to a log of the process."""
    log = places.work / "logs" / f"{os.getpid()}.txt"
    with log.open("a") as stream, contextlib.redirect_stderr(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(cell, places)


def begin_worker(threads: int) -> None:
    """Sets the process's share of the cores, and that it ends when its parent ends, in whatever way."""
    import torch

    torch.set_num_threads(threads)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
