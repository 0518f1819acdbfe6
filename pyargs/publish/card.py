"""The README.md of what is pushed: what it was made from, under which licence, what was measured, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from pyargs import __version__
from pyargs.config import check_kinds
from pyargs.errors import PyargsError
from pyargs.files import read_json, sha256
from pyargs.lm.hub import MODELS, is_public
from pyargs.metrics.bootstrap import user_interval

TEMPLATES = Path(__file__).parent
PAPERS = {
    "genarm": "2410.08193",
    "lore": "2504.14439",
    "pal": "2406.08469",
    "pdpo": "2402.05133",
    "pref": "2503.06358",
    "vpl": "2408.10075",
}
"""arXiv numbers of the methods that have a paper of their own."""
HOUSE = "2512.23067"
"""arXiv number of the paper whose evaluation pyargs follows."""
WORDS = {
    "rm_accuracy": "RM accuracy",
    "policy_accuracy": "policy accuracy",
    "win_rate": "win rate over the unguided answers",
    "personal": "guided for the user",
    "global": "guided",
    "base": "the policy alone",
    "weight_0": "weight 0",
    "paper": "in the paper's form",
    "centred": "rewards centred",
    "all": "mean per token",
    "mean": "mean per token",
    "sum": "sums",
    "margin": "margin over the untrained policy",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "bertscore": "BERTScore",
    "perplexity": "perplexity of the answers",
    "words": "words in an answer",
}
SHARES = ("accuracy", "win_rate")
MEANS = ("rouge1", "rougeL", "bertscore", "perplexity", "words")
RESULT = {"stage": str, "values": dict, "config": dict, "inputs": dict}


def measured(results: Sequence[str | Path], folder: Path) -> list[dict]:
    """Of each file of `pyargs evaluate`: {"split", "data" (a hash), "policy", "weight", "rows"}.

    Raises PyargsError for a file of another model. A policy that nobody else has is called "a policy of the owner's".
    """
    own = sha256(folder) if results else None
    found = []
    for file in results:
        result = read_json(file)
        check_kinds(result, RESULT, f"{file} is no file of `pyargs evaluate`")
        if result["stage"] != "evaluate":
            raise PyargsError(f"{file} is of stage '{result['stage']}': results are what `pyargs evaluate` writes")
        if result["inputs"].get("model") != own:
            raise PyargsError(f"{file} was measured on another model than {folder} is now: evaluate this one")
        policy, values = result["config"].get("policy"), result["values"]
        found.append(
            {
                "split": result["config"].get("split"),
                "data": result["inputs"].get("data"),
                "policy": policy if policy is None or is_public(policy) else "a policy of the owner's",
                "weight": values.get("reward_weight"),
                "rows": list(measures(values)),
            }
        )
    return found


def measures(values: dict, path: tuple[str, ...] = ()) -> Iterator[dict]:
    """Every measure of a result: name, kind, value, and low, high (95%, over users), n, users where single values are there.

    No user's own outcome is among them.
    """
    for name, one in values.items():
        here = (*path, name)
        if name == "generations" and isinstance(one, dict):
            yield from _of_answers(one, values.get("answers") or [])
        elif isinstance(one, dict) and (share := next((word for word in SHARES if word in one), None)):
            each = {user: [100.0 * int(mark) for mark in marks] for user, marks in (one.get("each") or {}).items()}
            yield _measure(here, one[share], each)
        elif isinstance(one, dict):
            yield from measures(one, here)


def _of_answers(means: dict, answers: list[dict]) -> Iterator[dict]:
    for name in MEANS:
        if isinstance(means.get(name), (int, float)):
            each: dict[str, list[float]] = {}
            for answer in answers:
                if name in answer:
                    each.setdefault(answer["user_id"], []).append(answer[name])
            yield _measure((name,), means[name], {} if name == "words" else each)
    if "win_rate" in means:
        yield from measures({"win_rate": means["win_rate"]})


def _measure(path: tuple[str, ...], value: float, each: dict[str, list[float]]) -> dict:
    over = user_interval(each) if each else {"low": None, "high": None, "n": None, "users": None}
    words = [WORDS.get(name, name) for name in path]
    return {"kind": path[0], "name": ", ".join(words), "value": value, **{k: over[k] for k in ("low", "high", "n", "users")}}


def model_card(**about) -> str:
    """The card of a staged model; `about` is what `stage` found and was told."""
    config, data = about["config"], about["data"]
    method = config.get("method") or "unknown"
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="ranking of held-out preference pairs, and guided answers",
            dataset_type="preference-pairs",
            dataset_name=data,
            dataset_split=one["split"],
            dataset_revision=one["data"],
            metric_type=row["kind"],
            metric_name=f"{row['name']}{_interval(row)}",
            metric_value=round(row["value"], 3),
        )
        for one in about["measured"]
        for row in one["rows"]
    ]
    embedded = MODELS.get(config["backbone"])
    base = embedded.base if embedded else config["backbone"]
    meta = ModelCardData(
        library_name="pyargs",
        base_model=None if base == "tiny-random" else base,
        datasets=[data] if _hub_name(data) else None,
        tags=[config["kind"].replace("_", "-"), "personalization", method.removesuffix(".py")],
        eval_results=results or None,
        model_name=about["repo"] if results else None,
    )
    return _filled(ModelCard, meta, "model.md.j2", about | {"method": method, "embedded": embedded})


def users_card(**about) -> str:
    """The card of users that are pushed apart from their model."""
    meta = ModelCardData(library_name="pyargs", tags=["personalization", "users"])
    return _filled(ModelCard, meta, "users.md.j2", about | {"method": about["config"].get("method")})


def generations_card(**about) -> str:
    """The card of a data set of answers that a model wrote."""
    meta = DatasetCardData(language="en", tags=["personalization", "generated"], pretty_name=about["title"])
    return _filled(DatasetCard, meta, "generations.md.j2", about)


def _filled(kind, meta, template: str, about: dict) -> str:
    papers = [paper for paper in (PAPERS.get(about.get("method")), HOUSE) if paper]
    words = {"version": __version__, "papers": papers, "interval": _interval, **about}
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return kind.from_template(meta, template_str="---\n{{ card_data }}\n---\n" + text, **words).content.rstrip() + "\n"


def _interval(row: dict) -> str:
    if row["users"] is None:
        return ""
    if row["low"] is None:
        return f" (one user, {row['n']} values: no interval)"
    return f" (95% over {row['users']} users: {row['low']:.2f} to {row['high']:.2f}; {row['n']} values)"


def _hub_name(data: str) -> bool:
    return "/" in data and is_public(data)
