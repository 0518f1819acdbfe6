"""Prompts in bulk on a Ray cluster: Ray Data streams them through actors, each of which holds an engine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import torch

from pyargs.decode.engine import Engine
from pyargs.decode.pair import known_wishes, load_pair
from pyargs.errors import PyargsError, extra
from pyargs.files import TUNED, writing
from pyargs.models.folder import locate
from pyargs.progress import watched

with extra("ray", "work on Ray"):
    import ray
    import ray.data
    from ray.exceptions import RayTaskError, UserCodeException

KILLED = 3
"""Times that the worker of one piece of work may be lost before the work fails."""
CALL = 4
"""Prompts of one call of an actor, in rows of its engine: more keep the rows full, fewer are lost with an actor."""
COLUMNS = {
    "text": pyarrow.string(),
    "tokens": pyarrow.list_(pyarrow.int64()),
    "finish_reason": pyarrow.string(),
    "rewards": pyarrow.list_(pyarrow.float64()),
    "slots": pyarrow.list_(pyarrow.int64()),
    "backend": pyarrow.string(),
}
"""What `map_prompts` adds: fields of `Answer`."""

Files = dict[str, bytes]
"""Contents by path, relative to a folder that is the reader's own."""


def map_prompts(
    dataset,
    model: str | Path | None = None,
    *,
    policy: str | None = None,
    dtype: str = "float32",
    backbone: str | None = None,
    backend: str = "auto",
    max_rows: int = 8,
    best_of: int = 0,
    eos_reward: str | None = None,
    num_cpus: int = 1,
    num_gpus: float = 0,
    workers: int | None = None,
    **wish,
):
    """Answers to the prompts of a `ray.data.Dataset`: the same rows with the columns of `COLUMNS`, as `Engine` answers them.

    dataset: columns prompt (str, messages, or ids), user_id unless the model is the same for everyone, and seed (int) if
    answers are sampled. model: a folder or hub name; None for the policy alone. It is sent to the workers, which share no
    disk; policy and backbone are names, or paths that each machine has. num_cpus, num_gpus: of each actor, whose engine uses
    as many threads. workers: the most actors, by default as many as there is room for. policy to eos_reward are arguments of
    `Engine`, wish those of `Engine.submit`.

    It is lazy, as all of Ray Data: errors of the engine come to whoever reads the rows. An actor that is lost is replaced, and
    its call is made again. Raises PyargsError for an unknown argument and a model that is no folder.
    """
    if model is not None and not isinstance(model, (str, Path)):
        raise PyargsError("workers load the model themselves: save it with model.save_pretrained(folder), and give the folder")
    if {"seed", "prompt", "user"} & wish.keys():
        raise PyargsError("prompts, users and seeds are columns of the dataset: prompt, user_id, seed")
    options = dict(backend=backend, max_rows=max_rows, best_of=best_of, eos_reward=eos_reward)
    return dataset.map_batches(
        Answering,
        fn_constructor_kwargs=dict(
            files=None if model is None else packed(locate(model)),
            pair=dict(policy=policy, dtype=dtype, backbone=backbone),
            threads=num_cpus,
            options=options,
            wish=known_wishes(wish),
        ),
        batch_format="pyarrow",
        batch_size=CALL * max_rows,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def dataset(rows: list[dict], max_rows: int) -> ray.data.Dataset:
    """Rows as Ray Data has them, in blocks that actors answer one by one."""
    return ray.data.from_items(rows, override_num_blocks=-(-len(rows) // (CALL * max_rows)))


def all_rows(dataset: ray.data.Dataset) -> list[dict]:
    """Computes a dataset; an actor's own error where one fails."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = watched()
    try:
        return dataset.take_all()
    except (RayTaskError, UserCodeException) as error:
        raise cause_of(error) from None


class Answering:
    """The actor: an engine, and what is wished of each prompt."""

    def __init__(self, files: Files | None, pair: dict, threads: int, options: dict, wish: dict):
        torch.set_num_threads(threads)
        with placed(files) as folder:
            policy, model = load_pair(pair.pop("policy"), folder, **pair)
        self.engine, self.wish = Engine(policy, model, **options), wish
        sampled = self.wish.get("temperature") or options["best_of"]
        self.needs_seed = bool(sampled)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        given = {name: batch[name].to_pylist() for name in ("prompt", "user_id", "seed") if name in batch.column_names}
        if self.needs_seed and "seed" not in given:
            raise PyargsError("sampled answers need a column seed, a whole number for each prompt: a lost call is made again")
        answers = self.engine.generate(given["prompt"], given.get("user_id"), seed=given.get("seed"), **self.wish)
        for name, kind in COLUMNS.items():
            column = pyarrow.array([getattr(answer, name) for answer in answers], kind)
            batch = batch.drop_columns([name]) if name in batch.column_names else batch
            batch = batch.append_column(name, column)
        return batch


# -- the cluster -------------------------------------------------------------------------------------------------------


def connect(address: str | None = None, **runtime) -> None:
    """Joins the cluster at `address`, of RAY_ADDRESS or of `ray start` on this machine, or makes one of this machine's own.

    Does nothing where this process has joined one. runtime: of Ray's `runtime_env`. Raises PyargsError where none is there.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(
            address=address, include_dashboard=False, logging_level="WARNING", log_to_driver=False, runtime_env=runtime or None
        )
    except (ConnectionError, ValueError) as error:
        raise PyargsError(
            f"no Ray cluster answers at {address}: {error}. Fix: `ray start --head` there, or no --address"
        ) from error


def gpus() -> int:
    """Those of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def result(reference):
    """What a task gives; its own error where it fails."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise cause_of(error) from None


def cause_of(error: BaseException) -> BaseException:
    """The error behind those that Ray has around it. Of one behind Ray Data's own its words alone are left."""
    if said := re.findall(r"^pyargs\.errors\.\w+: (.+)$", str(error), re.MULTILINE):
        return PyargsError(said[0])
    return getattr(error, "cause", None) or error


def with_model(function: Callable, model: str | Path | None, *args, num_cpus: int, num_gpus: float):
    """function(folder of the model, *args), computed by a worker."""
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=KILLED)(_with_model)
    return result(task.remote(function, None if model is None else packed(locate(model)), num_cpus, args))


def _with_model(function: Callable, files: Files | None, threads: int, args):
    torch.set_num_threads(threads)
    with placed(files) as folder:
        return function(folder, *args)


# -- files without a shared disk ---------------------------------------------------------------------------------------


def packed(folder: Path, below: Path | None = None) -> Files:
    """The files of a folder with their paths below `below` (default: the folder), without what pyargs notes beside them."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(below or folder)): file.read_bytes() for file in found if file.name != TUNED}


def unpack(files: Files, folder: Path, but: Iterable[str] = ()) -> None:
    """Writes files into a folder. What is there with the same content stays as it is; but: names that are left out."""
    for name, content in files.items():
        file = folder / name
        if file.name in but or file.exists() and file.read_bytes() == content:
            continue
        with writing(file) as temporary:
            temporary.write_bytes(content)


@contextlib.contextmanager
def placed(files: Files | None):
    """A folder with these files, for as long as they are read; None without files."""
    if files is None:
        yield None
        return
    with TemporaryDirectory() as folder:
        unpack(files, Path(folder))
        yield os.fspath(folder)
