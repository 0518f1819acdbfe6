"""PRISM: people from 75 countries who talked with language models and chose among their replies (Kirk et al. 2024).

Source: `HannahRoseKirk/prism-alignment`, survey.jsonl and conversations.jsonl. Each turn gives a pair of the chosen reply with
every other; the prompt is the conversation so far, with the chosen replies. Users and dialogues are split as in P-DPO (Li et
al. 2024): no dialogue is in two splits. Preferences are sparse: hardly any pair is judged by two users.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from pyargs.config import option
from pyargs.data import schema, sources
from pyargs.errors import PyargsError
from pyargs.prepare.folder import Built

LICENCE = "human-written texts: CC BY 4.0; model replies: CC BY-NC 4.0; no attempt at identifying participants"
REPOSITORY = "HannahRoseKirk/prism-alignment"
SEED = 123  # of P-DPO's split
SHARE = 0.9  # of the users, and of each train user's dialogues
FULL = {"conversations": 8011, "users with conversations": 1396}
EXPECTED = {"dialogues without a usable turn": ["c2536", "c4146"], "train users drawn": 1234, "other users drawn": 162}


@dataclass
class Config:
    max_characters: int = option(2300, "longest user turn + reply; longer ones give no pair (P-DPO)", least=1)
    seed: int = option(0, "of the new users' halves (paper silent)")
    embedder: str = option("minilm", "sentence encoder of the cosine on the card; none leaves it out")


def build(source: str, config: Config) -> Built:
    """Pairs of the train users (train, train_test) and of the new users (support, query), by dialogue.

    source: the folder with survey.jsonl and conversations.jsonl (plain, .gz or .parquet), or "hub". 90% of the users are train
    users, 90% of whose dialogues are train, the others train_test; users with a single dialogue are dropped. A new user's
    dialogues are halved into support and query. Columns beyond the common ones: dialogue, turn.
    Raises PyargsError, naming file and row: damaged files, an id twice, content that is no string, an unknown user.
    """
    if source == "hub":
        source = sources.from_hub(REPOSITORY, ["survey.jsonl", "conversations.jsonl"])
    folder = sources.local(source)
    files = [sources.one_of(folder, stem, ".jsonl", ".parquet") for stem in ("survey", "conversations")]
    users = _users(files[0])
    dialogues: dict[str, str] = {}
    pairs: dict[str, list[dict]] = {}
    counts: Counter[str] = Counter()
    unusable = []
    for place, row in sources.rows(files[1]):
        dialogue, user, turns = _conversation(place, row)
        if user not in users:
            raise PyargsError(f"{place}: user {user} is not in {files[0].name}, or completed no conversation there.")
        if dialogue in dialogues:
            raise PyargsError(f"{place}: the conversation {dialogue} is there twice.")
        dialogues[dialogue] = user
        if not any(_usable(turn, config.max_characters) for turn in turns):
            unusable.append(dialogue)
            continue
        users[user].append(dialogue)
        pairs[dialogue] = list(_pairs(dialogue, user, turns, config.max_characters, counts))
    of_user = {user: found for user, found in users.items() if found}
    drawn, split_of = _split(of_user, config.seed)
    counts.update({"conversations": len(dialogues), "users with conversations": len(set(dialogues.values())), **drawn})
    full = all(counts[name] == count for name, count in FULL.items())
    if full:
        found = {"dialogues without a usable turn": sorted(unusable)} | {name: counts[name] for name in list(EXPECTED)[1:]}
        if found != EXPECTED:
            raise PyargsError(f"The source has as many rows as the published one, but {found} comes out, not {EXPECTED}.")
    rows = [pair | {"split": split_of[dialogue]} for dialogue in split_of for pair in pairs[dialogue]]
    rows, lost = _complete(rows)
    counts["users dropped because a split of theirs has no pair"] = lost
    notes = [
        "Paper: 1,232 train users with 22.1 pairs and 139 new ones with 14.5 (support). Its main text rests on one query pair "
        "for each new user, where the standard error of an accuracy is about 4 points.",
        f"Dialogues without a usable turn: {', '.join(sorted(unusable)[:10]) or 'none'}.",
    ]
    if not full:
        notes.append(f"Not the full source ({FULL['conversations']} conversations): nothing could be asserted.")
    return Built(rows, dict(counts), notes, files)


def _users(path) -> dict[str, list[str]]:
    """The users who completed conversations, in the order of the survey, each with room for dialogues."""
    users: dict[str, list[str]] = {}
    for place, row in sources.rows(path):
        user, completed = row.get("user_id"), row.get("num_completed_conversations")
        if not isinstance(user, str) or not isinstance(completed, int):
            raise PyargsError(f"{place}: no user_id or num_completed_conversations: not the survey of PRISM.")
        if user in users:
            raise PyargsError(f"{place}: the user {user} is there twice.")
        if completed:
            users[user] = []
    return users


def _conversation(place: str, row: dict) -> tuple[str, str, list[dict]]:
    """(id, user, turns); a turn is {"user": [texts], "chosen": [texts], "rejected": [texts]}."""
    turns: dict[int, dict[str, list[str]]] = defaultdict(lambda: {"user": [], "chosen": [], "rejected": []})
    try:
        for item in row["conversation_history"]:
            if not isinstance(item["content"], str):
                raise PyargsError(
                    f"{place}: a content in turn {item['turn']} is {type(item['content']).__name__}, not a string."
                )
            if item["role"] not in ("user", "model") or (item["role"] == "model" and type(item["if_chosen"]) is not bool):
                raise PyargsError(f"{place}: turn {item['turn']} has a role or an if_chosen that PRISM does not know.")
            kind = "user" if item["role"] == "user" else "chosen" if item["if_chosen"] else "rejected"
            turns[item["turn"]][kind].append(item["content"])
        if not isinstance(row["conversation_id"], str) or not isinstance(row["user_id"], str):
            raise PyargsError(f"{place}: conversation_id or user_id is not a string.")
        return row["conversation_id"], row["user_id"], [turns[number] for number in sorted(turns)]
    except (KeyError, TypeError) as error:
        raise PyargsError(f"{place}: not a conversation of PRISM ({type(error).__name__}: {error}).") from None


def _usable(turn: dict, longest: int) -> bool:
    """Whether P-DPO counts the turn: someone asked, chose and rejected, and nothing is too long."""
    if not (turn["user"] and turn["chosen"] and turn["rejected"]):
        return False
    return all(len(turn["user"][0]) + len(reply) <= longest for reply in (turn["chosen"][0], *turn["rejected"]))


def _pairs(dialogue: str, user: str, turns: list[dict], longest: int, counts: Counter) -> Iterator[dict]:
    history: list[dict] = []
    for number, turn in enumerate(turns):
        if not (turn["user"] and turn["chosen"]):
            counts["turns without a user's text or a choice"] += 1
            continue
        asked, chosen = {"role": "user", "content": turn["user"][0]}, turn["chosen"][0]
        for rejected in turn["rejected"]:
            if len(asked["content"]) + max(len(chosen), len(rejected)) > longest:
                counts["pairs that are too long"] += 1
            elif chosen.strip() == rejected.strip() or not all(text.strip() for text in (asked["content"], chosen, rejected)):
                counts["pairs of the same or of empty texts"] += 1
            else:
                pair = {
                    "user_id": user,
                    "prompt": [*history, asked],
                    "chosen": chosen,
                    "rejected": rejected,
                    "dialogue": dialogue,
                    "turn": number,
                }
                yield pair | {"pair_id": schema.text_id(pair)}
        if asked["content"].strip() and chosen.strip():
            history = [*history, asked, {"role": "assistant", "content": chosen}]


def _split(of_user: dict[str, list[str]], seed: int) -> tuple[dict, dict[str, str]]:
    """(counts, {dialogue: split}): users, then dialogues, drawn from one stream of numpy as in P-DPO's notebook."""
    import numpy as np

    stream = np.random.RandomState(SEED)
    order = np.array(list(of_user))
    stream.shuffle(order)
    cut = int(len(order) * SHARE)
    split_of: dict[str, str] = {}
    single = 0
    for user in order[:cut].tolist():
        own = np.array(of_user[user])
        stream.shuffle(own)
        first = int(len(own) * SHARE)
        if first == 0:
            single += 1
            continue
        split_of |= {dialogue: "train" if i < first else "train_test" for i, dialogue in enumerate(own.tolist())}
    new = [user for user in order[cut:].tolist() if len(of_user[user]) > 1]
    for user in new:
        own = sorted(of_user[user])
        random.Random(f"{seed} {user}").shuffle(own)
        split_of |= {dialogue: "support" if i < (len(own) + 1) // 2 else "query" for i, dialogue in enumerate(own)}
    counts = {
        "train users drawn": cut - single,
        "other users drawn": len(order) - cut + single,
        "users with a single dialogue dropped": len(order) - (cut - single) - len(new),
    }
    return counts, split_of


def _complete(rows: list[dict]) -> tuple[list[dict], int]:
    """The rows without users who lost all pairs of train, support or query; and the number of these users."""
    splits = defaultdict(set)
    for row in rows:
        splits[row["user_id"]].add(row["split"])
    keep = {user for user, found in splits.items() if "train" in found or {"support", "query"} <= found}
    return [row for row in rows if row["user_id"] in keep], len(splits) - len(keep)
