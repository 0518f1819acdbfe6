"""Demonstrations: whose they are, which stay where there is no room, and that one prompt is scored and generated from."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import config_of, edit

from pyargs import load_model
from pyargs.data import of_split, synthetic
from pyargs.errors import PyargsError
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt
from pyargs.methods import icl
from pyargs.training import adapt, trainer


@pytest.fixture
def shown(lm_folder, rows):
    def make(**more):
        model = trainer.train("icl", rows, config_of("icl", lm_folder, **more))
        adapt.adapt(model, rows)
        return model

    return make


def test_demonstrations_are_the_users_own_support_pairs(shown, rows):
    model = shown()
    support = of_split(rows, "support")
    row = of_split(rows, "query")[0]
    text = model.tokenizer.decode(model.prompt_ids(row["prompt"], row["user_id"]))
    own = [r for r in support if r["user_id"] == row["user_id"]]
    inside = [r for r in own if f"Preferred: {r['chosen']}\nNot preferred: {r['rejected']}" in text]
    assert len(inside) == 3 and text.count("Example") == 3
    assert text.rstrip().endswith("assistant") and f"Prompt: {row['prompt']}\nPreferred:<|im_end|>" in text
    assert not any(r["chosen"] in text for r in support if r["user_id"] != row["user_id"])
    assert row["chosen"] not in text and row["rejected"] not in text
    assert "Not preferred" not in shown(show="chosen").tokenizer.decode(shown(show="chosen").prompt_ids("tell me", "new_00"))
    again, other = shown().prompt_ids("tell me", "new_00"), shown(seed=1).prompt_ids("tell me", "new_00")
    assert model.prompt_ids("tell me", "new_00") == again != other  # seeded, and drawn anew for another seed


def test_what_is_scored_is_what_is_generated_from(shown, rows):
    """The ids before a scored response are the ids that generation starts with."""
    model = shown()
    query = of_split(rows, "query").select(range(3))
    encoded, pairs = model.encode(query, stop=False)
    for row, (group, chosen, _) in zip(query, pairs, strict=True):
        assert encoded[group][0] == model.prompt_ids(row["prompt"], row["user_id"])
        ids = torch.tensor([encoded[group][0] + encoded[group][1][chosen]])
        with torch.no_grad():
            logs = model.lm(ids).logits[0].log_softmax(-1)
        n = len(encoded[group][0])
        want = logs[n - 1 : -1].gather(1, ids[0, n:].unsqueeze(1)).sum().item()
        place = list(query["pair_id"]).index(row["pair_id"])
        assert model.pair_logprobs(query)[0][place, 0].item() == pytest.approx(want, abs=1e-3)


def test_too_long_prompts_lose_the_farthest_demonstrations_first(shown):
    model = shown()
    full = model.prompt_ids("tell me about the old one", "new_00")
    examples = lambda ids: re.sub(r"Example \d+\n", "", model.tokenizer.decode(ids))  # noqa: E731
    text = examples(full)
    alone = len(encode_prompt(model.tokenizer, "tell me about the old one"))
    for room in range(len(full) - alone - 1, -1, -7):
        model.demonstrations.demonstration_tokens = room
        cut = model.prompt_ids("tell me about the old one", "new_00")
        left = examples(cut)
        assert alone <= len(cut) <= alone + room and "tell me about" in left
        if "Prompt:" in left:  # the last demonstrations, in order, are those that stay
            assert left[left.index("Prompt:") :] in text
    with pytest.raises(PyargsError, match="no room"):
        model.prompt_ids("tell me about the old one", "new_00", 4)
    model.demonstrations.instruction = "tell me about the "
    room = len(encode_prompt(model.tokenizer, "tell me about the"))
    with pytest.raises(PyargsError, match="no room behind the instruction"):
        model.prompt_ids("tell me about the old one " + "old " * 20, "new_00", room)


def test_contents_are_cut_and_the_instruction_is_said_once(shown):
    model = shown(content_tokens=2, instruction="tell me ")
    model.demonstrations.of_user["new_00"] = [{"prompt": "tell me one two old new", "chosen": "cat", "rejected": "saw"}]
    text = model.tokenizer.decode(model.prompt_ids("tell me about it", "new_00"))
    assert "Prompt: one two\nPreferred: cat" in text and "Prompt: about it\n" in text and text.count("tell me") == 1


def test_conversations_lose_their_oldest_turns_and_contents_must_be_text(shown):
    model = shown()
    turns = [{"role": role, "content": f"old {n} please " * 5} for n in range(20) for role in ("user", "assistant")]
    prompt = [*turns, {"role": "user", "content": "tell me"}]
    cut = model.tokenizer.decode(model.prompt_ids(prompt, "new_00", 200))
    assert "tell me" in cut and "old 0 " not in cut
    with pytest.raises(PyargsError, match="must be a str"):
        model.prompt_ids([{"role": "user", "content": ["tell me"]}], "new_00")


def test_a_cut_prompt_is_the_same_for_every_response(shown, rows):
    """However long the response to be scored is: the demonstrations that fit do not depend on it."""
    model = shown()
    whole = len(model.prompt_ids("tell me", "new_00"))
    model.demonstrations.demonstration_tokens = whole - len(encode_prompt(model.tokenizer, "tell me")) - 5
    query = of_split(rows, "query").select(range(2)).map(lambda row: {"prompt": "tell me", "user_id": "new_00"})
    long = query.map(lambda row: {"chosen": row["chosen"] * 30})
    (one, _), (two, _) = model.encode(query), model.encode(long)
    assert one[0][0] == two[0][0] == model.prompt_ids("tell me", "new_00") and len(one[0][0]) <= whole - 5


def test_retrieval_puts_the_most_similar_last(shown, monkeypatch):
    from pyargs.models import demonstrations

    vectors = {"tell me": [1.0, 0.0]}
    monkeypatch.setattr(demonstrations, "embed", lambda name, texts: torch.tensor([vectors.get(t, [0.0, 1.0]) for t in texts]))
    model = shown(retrieve="minilm", shots=2)
    pairs = model.demonstrations.of_user["new_00"]
    vectors |= {pairs[2]["prompt"]: [0.9, 0.1], pairs[5]["prompt"]: [0.5, 0.5]}
    assert model.demonstrations.choose("tell me", "new_00") == [pairs[5], pairs[2]]


def test_retrieval_by_words_and_without_the_instruction(shown):
    """BM25 over contents: the instruction, which all prompts begin with, says nothing about what is similar."""
    model = shown(retrieve="bm25", shots=2, instruction="cat cat cat cat: ")
    texts = ["red dog near hill", "cat", "blue fox", "blue fox near hill", "rain"]
    pairs = [{"prompt": f"cat cat cat cat: {text}", "chosen": "a", "rejected": "b"} for text in texts]
    model.demonstrations.of_user["new_00"] = pairs
    assert model.demonstrations.choose("cat cat cat cat: fox on a hill blue", "new_00") == [pairs[2], pairs[3]]
    # Nothing in common: the user's first pairs, not an error.
    assert model.demonstrations.choose("cat cat cat cat: zzz", "new_00") == [pairs[1], pairs[0]]


def test_retrieval_by_any_sentence_encoder(shown, lm_folder, rows):
    model = shown(retrieve=str(lm_folder), shots=3)
    row = of_split(rows, "query")[0]
    chosen = model.demonstrations.choose(row["prompt"], row["user_id"])
    own = model.demonstrations.of_user[row["user_id"]]
    from pyargs.lm.embed import embed

    query, *vectors = embed(str(lm_folder), [row["prompt"], *(pair["prompt"] for pair in own)])
    order = sorted(range(len(own)), key=lambda i: vectors[i] @ query)[-3:]
    assert chosen == [own[i] for i in order]


def test_fields_are_called_as_the_data_call_them(shown):
    model = shown(shots=1, prompt_name="Abstract", response_name="title", instruction="tell me ")
    model.demonstrations.of_user["new_00"] = [{"prompt": "tell me one", "chosen": "cat", "rejected": "saw"}]
    text = model.tokenizer.decode(model.prompt_ids("tell me two", "new_00"))
    assert "Abstract: one\nPreferred title: cat\nNot preferred title: saw\n\nAbstract: two\nPreferred title:<|im_end|>" in text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(30, 400), st.integers(1, 80), st.integers(0, 6), st.sampled_from(["random", "bm25"]))
def test_template_and_instruction_are_never_cut(shown, room, length, count, retrieve):
    model = shown(instruction="say that: ", shots=5, retrieve=retrieve)
    words = "old new one two red blue".split()
    model.demonstrations.of_user["new_00"] = [
        {"prompt": f"say that: {words[i % 6]} hill " + "lake " * i, "chosen": "cat", "rejected": "saw"} for i in range(count)
    ]
    model.demonstrations.demonstration_tokens = room
    ids = model.prompt_ids("say that: " + " ".join(words[i % 6] for i in range(length)), "new_00", 40)
    text = model.tokenizer.decode(ids)
    assert len(ids) <= 40 + room and text.count("say that:") == 1
    assert text.startswith("<|im_start|>user\nsay that:") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    shown_now = text.count("Example ")
    assert shown_now <= min(5, count) and ("old" in text.split("Example")[-1] or length == 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 120), st.integers(20, 90), st.integers(0, 200), st.booleans())
def test_a_row_with_demonstrations_keeps_as_much_of_a_prompt_as_the_others(lm_folder, words, limit, room, dialogue):
    """However long it is: what is asked is what `encode_prompt` leaves of it, and demonstrations come on top."""
    lm, tokenizer = load_lm(lm_folder)
    prompt = " ".join("old new one two red blue".split()[i % 6] for i in range(words))
    if dialogue:
        prompt = [
            {"role": "user", "content": "dog"},
            {"role": "assistant", "content": "cat"},
            {"role": "user", "content": prompt},
        ]
    alone = encode_prompt(tokenizer, prompt, limit)
    none = icl.build(lm, tokenizer, [], icl.Config(shots=0, backbone=lm_folder))
    assert none.prompt_ids(prompt, "anna", limit) == alone
    model = icl.build(lm, tokenizer, [], icl.Config(shots=4, backbone=lm_folder, demonstration_tokens=room))
    model.demonstrations.of_user["anna"] = [{"prompt": "tell me", "chosen": "cat", "rejected": "dog"}] * 4
    ids = model.prompt_ids(prompt, "anna", limit)
    assert len(alone) <= len(ids) <= len(alone) + room
    asked = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", tokenizer.decode(alone), re.DOTALL)[-1]
    assert (f"Prompt: {asked.strip()}\nPreferred:" in tokenizer.decode(ids)) == (ids != alone)


def test_demonstrations_saved_before_keep_their_one_limit(lm_folder, tmp_path):
    lm, tokenizer = load_lm(lm_folder)
    model = icl.build(lm, tokenizer, [], icl.Config(shots=3, backbone=lm_folder))
    model.demonstrations.of_user["anna"] = [{"prompt": "tell me", "chosen": "cat", "rejected": "dog"}] * 3
    model.about = {"method": "icl", "fields": {}, "backbone": lm_folder, "dtype": "float32"}
    model.save_pretrained(tmp_path / "m")

    def older(config):
        config["demonstrations"].pop("demonstration_tokens")
        config["demonstrations"]["max_tokens"] = 200
        config["fields"]["response_tokens"] = 256

    edit(tmp_path / "m", older)
    old = load_model(tmp_path / "m")
    assert (
        90 < len(old.prompt_ids("old one", "anna", 20)) <= 200 and 190 < len(old.prompt_ids("old " * 900, "anna", 20)) <= 200
    )
    with pytest.raises(PyargsError, match="'response_tokens'.*train it again"):
        adapt.adapt(old, synthetic.load(users=1, pairs=2, new_users=1, support=2, query=1))
