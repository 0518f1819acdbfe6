"""Titles of scientific papers by author, in the format of LaMP-5 (personalized scholarly title generation).

A folder holds `train_questions.json` and `dev_questions.json` (plain or .gz), each an array of `{"id", "input",
"profile": [{"id", "title", "abstract", "date"}]}`, and `*_outputs.json` with `{"task": "LaMP_5", "golds": [{"id",
"output"}]}`. One question is one user: the authors of `train` are trained on, those of `dev` adapted to. LaMP:
Salemi et al. 2023 (arXiv 2304.11406). `build` makes pairs of them: the author's title against that of a similar paper.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from pyargs.config import option
from pyargs.data import schema, sources
from pyargs.data.schema import normalized
from pyargs.data.sets.pref_lamp import FILES, INSTRUCTION, items
from pyargs.errors import PyargsError
from pyargs.prepare.folder import Built
from pyargs.prepare.mining import hard_negatives
from pyargs.progress import progress_bar

LICENCE = "LaMP: CC BY-NC-SA 4.0; a folder of your own: that of its texts"
ADDRESS = "https://ciir.cs.umass.edu/downloads/LaMP/LaMP_5"
NEW_USERS = 126 / 611  # share of the paper's users who are adapted to


@dataclass
class Config:
    negatives: str = option(
        "neighbours",
        "neighbours: the title of a similar abstract of another user (paper); policy: the "
        "policy's own title of the same abstract",
        choices=["neighbours", "policy"],
    )
    embedder: str = option("Qwen/Qwen3-Embedding-0.6B", "sentence encoder of abstracts (paper); minilm needs no hub")
    k: int = option(10, "neighbours of which one is drawn (paper silent)", least=1)
    near: float = option(0.95, "cosine from which two abstracts are one paper (paper silent)")
    policy: str = option("smollm2-135m", "negatives=policy: the language model that writes the titles, greedily")
    dtype: str = option("float32", "negatives=policy: of the policy", choices=["float32", "bfloat16"])
    max_new_tokens: int = option(64, "negatives=policy: longest title of the policy (paper: its limit of generation)", least=1)
    users: int | None = option(None, "draw so many users of both files, 126/611 of them to adapt to (paper: 611)", least=2)
    train_test: float = option(0.2, "share of each train user's papers to hold out (default)")
    seed: int = option(0, "of all draws")


def build(source: str, config: Config) -> Built:
    """One pair for each paper: prompt = instruction + abstract, chosen = the author's title, rejected by `negatives`.

    source: a folder with LaMP's files, or "hub" (LaMP's own server). Neighbours are sought among the papers of other users of
    the same kind (train or adapt); the user's own titles and near-duplicates are left out. A new user's oldest 80% of papers
    are support, the newest 20% with the question are query; among papers of one year, or without dates, the choice is drawn.
    Each paper of a user is there once, and no train user has a paper of a new user. Further columns: date, similar (id of
    the neighbour), cosine. Raises PyargsError, naming file and row; also for a user with one paper.
    """
    if source == "hub":
        for stem in FILES:
            for kind in ("questions", "outputs"):
                path = sources.download(f"{ADDRESS}/{stem}/{stem}_{kind}.json", f"lamp_5/{stem}_{kind}.json")
        source = path.parent
    folder = sources.local(source)
    for stem in FILES:
        for kind in ("questions", "outputs"):
            sources.one_of(folder, f"{stem}_{kind}", ".json")  # both kinds of users and their titles are needed
    if not config.near > 0:
        raise PyargsError(f"near is a cosine above 0 (above 1: no limit), not {config.near}.")
    if config.negatives == "neighbours" and config.embedder == "none":
        raise PyargsError("neighbours need an embedder, such as minilm; none serves negatives=policy alone.")
    papers, dropped = _once(_drawn(items(folder).to_list(), config))
    of_user = defaultdict(list)
    for paper in papers:
        of_user[paper["user_id"]].append(paper)
    for stem, kind in FILES.items():
        if not any(own[0]["user_split"] == kind for own in of_user.values()):
            raise PyargsError(f"{stem}_questions.json: no users to {'train on' if kind == 'train' else 'adapt to'}.")
    for user, own in of_user.items():
        if len(own) < 2:
            stem = next(stem for stem, kind in FILES.items() if kind == own[0]["user_split"])
            raise PyargsError(
                f"{stem}_questions.json: user {user} has a single paper (an empty profile): nothing to hold out."
            )
    _id_pairs(papers)
    undated = sum(_split_by_date(own, config.seed) for own in of_user.values() if own[0]["user_split"] == "adapt")
    counts = {
        "papers": len(papers),
        "users": len(of_user),
        **dropped,
        "new users without dates (query drawn at random)": undated,
        "new users with papers of one year in support and query": sum(map(_same_year, of_user.values())),
    }
    if config.negatives == "neighbours":
        rows, notes = _neighbours(papers, config)
        counts |= {"different abstracts": len({paper["prompt"] for paper in papers})}
    else:
        rows, lost, notes = _of_policy(papers, config)
        counts |= lost
    rows = schema.carve(rows, train_test=config.train_test, seed=config.seed)
    files = [sources.one_of(folder, f"{stem}_{kind}", ".json") for stem in FILES for kind in ("questions", "outputs")]
    return Built(rows, counts, notes, files)


def _drawn(papers: list[dict], config: Config) -> list[dict]:
    """All papers, or those of `users` users drawn from both files, of whom the paper's share is to be adapted to."""
    if config.users is None:
        return papers
    users = sorted({paper["user_id"] for paper in papers})
    if config.users > len(users):
        raise PyargsError(f"users={config.users}, but the source has {len(users)}.")
    drawn = random.Random(f"{config.seed} users").sample(users, config.users)
    new = set(drawn[: max(1, round(config.users * NEW_USERS))])
    kept = set(drawn)
    return [
        paper | {"user_split": "adapt" if paper["user_id"] in new else "train"} for paper in papers if paper["user_id"] in kept
    ]


def _once(papers: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Without papers that a user has twice (the question stays) and, of train users, those that a new user has, too.

    Users write together, and where users are drawn across the files a paper of a train user could be a new user's query.
    """
    new = {key for paper in papers if paper["user_split"] == "adapt" for key in _keys(paper)}
    kept, seen = [], defaultdict(set)
    twice = shared = 0
    for paper in reversed(papers):  # a user's question comes last
        if seen[paper["user_id"]].intersection(_keys(paper)):
            twice += 1
        elif paper["user_split"] == "train" and new.intersection(_keys(paper)):
            shared += 1
        else:
            seen[paper["user_id"]].update(_keys(paper))
            kept.append(paper)
    counts = {"papers that a user has twice, dropped": twice, "papers of train users that new users have, dropped": shared}
    return kept[::-1], counts


def _keys(paper: dict) -> tuple:
    return ("title", normalized(paper["title"])), ("abstract", normalized(paper["prompt"]))


def _same_year(own: list[dict]) -> bool:
    dates = {split: {paper["date"] for paper in own if paper.get("split") == split} for split in ("support", "query")}
    return bool((dates["support"] & dates["query"]) - {None})


def _id_pairs(papers: list[dict]) -> None:
    """Pair ids are the items' own; where two users have items of one id, with the user's id in front."""
    ids = [paper["item_id"] for paper in papers]
    several = len(set(ids)) < len(ids)
    for paper in papers:
        paper["pair_id"] = f"{paper['user_id']}-{paper['item_id']}" if several else paper["item_id"]


def _split_by_date(own: list[dict], seed: int) -> bool:
    """Marks a new user's papers as support or query; True if dates were missing, so that they had to be drawn."""

    def drawn(paper: dict) -> float:
        return random.Random(f"{seed} date {paper['pair_id']}").random()

    *profile, question = own
    undated = any(paper["date"] is None for paper in profile)
    # Years tie often: papers of one year come in a drawn order.
    profile = sorted(profile, key=drawn if undated else lambda paper: (paper["date"], drawn(paper)))
    query = max(1, int(0.2 * len(own) + 0.5))
    for i, paper in enumerate([*profile, question]):
        paper["split"] = "query" if i >= len(own) - query else "support"
    return undated


def _row(paper: dict, rejected: str, **more) -> dict:
    return {
        "user_id": paper["user_id"],
        "prompt": paper["prompt"],
        "chosen": paper["title"],
        "rejected": rejected,
        "split": paper.get("split", "train"),
        "pair_id": paper["pair_id"],
        "date": paper["date"],
        **more,
    }


def _neighbours(papers: list[dict], config: Config) -> tuple[list[dict], list[str]]:
    from functools import partial

    from pyargs.lm.embed import embed

    rows = []
    # What is held out of a train user's papers is known before the draws, as it is of a new user's.
    papers = schema.carve([{"split": "train", **paper} for paper in papers], train_test=config.train_test, seed=config.seed)
    for kind in FILES.values():
        own = [paper for paper in papers if paper["user_split"] == kind]
        if not own:
            continue
        vectors = embed(config.embedder, [paper["prompt"].removeprefix(INSTRUCTION) for paper in own], progress=True)
        found = hard_negatives(
            [paper["user_id"] for paper in own],
            [paper["title"] for paper in own],
            vectors,
            k=config.k,
            near=config.near,
            seed=config.seed,
            keys=[paper["item_id"] for paper in own],
            held=[paper["split"] in ("query", "train_test") for paper in own],
            progress=partial(progress_bar, desc=f"{kind} negatives"),
        )
        rows += [
            _row(paper, own[negative.row]["title"], similar=own[negative.row]["pair_id"], cosine=round(negative.cosine, 3))
            for paper, negative in zip(own, found, strict=True)
        ]
    mean = sum(row["cosine"] for row in rows) / len(rows)
    return rows, [
        f"Cosine between the abstracts of a pair's two titles: {mean:.3f} on average ({config.embedder}).",
        "No title that a user rejects in support is rejected in the user's query, nor one of train in train_test.",
        "The rejected title belongs to another paper, so that content decides most pairs without knowing the user: see what "
        "word_overlap reaches above, and build --negatives policy for pairs where it cannot.",
    ]


def _of_policy(papers: list[dict], config: Config) -> tuple[list[dict], dict, list[str]]:
    from pyargs.decode.prompts import greedy_answers

    prompts = [paper["prompt"] for paper in papers]
    titles = greedy_answers(config.policy, prompts, dtype=config.dtype, max_new_tokens=config.max_new_tokens)
    rows, empty, same = [], 0, 0
    for paper, answer in zip(papers, titles, strict=True):
        title = clean_title(answer)
        if not normalized(title):
            empty += 1
        elif normalized(title) == normalized(paper["title"]):
            same += 1
        else:
            rows.append(_row(paper, title))
    counts = {
        "titles of the policy that are empty, dropped": empty,
        "titles of the policy that are the author's, dropped": same,
    }
    return (
        rows,
        counts,
        [
            f"The rejected title is what {config.policy} writes for the same abstract (greedy, {config.max_new_tokens} "
            "tokens, first line, without quotes and a leading 'Title:'). Both titles fit the abstract: what tells them apart "
            "is the author's style, but also the traces of a model.",
            "An extra set: not one of the paper's, whose authors reject negatives written by a model because probes detect "
            "them.",
        ],
    )


def clean_title(answer: str) -> str:
    """A model's answer as a title: its first line that says something, without a label, quotes and markdown around it."""
    for line in answer.splitlines():
        line = line.strip().strip("*#").strip()
        if line.casefold().startswith("title:"):
            line = line[len("title:") :]
        line = line.strip(" *\"'“”‘’")
        if line:
            return line
    return ""
