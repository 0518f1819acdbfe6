"""Metrics: strict comparisons, ties counted, real ROUGE, and scores that agree with a pass of their own."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from conftest import reward_model, tiny_lm
from hypothesis import given
from hypothesis import strategies as st

from pyargs.errors import PyargsError
from pyargs.metrics.overlap import bertscore, rouge
from pyargs.metrics.perplexity import perplexities, perplexity
from pyargs.metrics.policy_accuracy import PairScores, pair_scores, policy_accuracy
from pyargs.metrics.rm_accuracy import rm_accuracy
from pyargs.metrics.win_rate import win_rate


def test_ties_are_errors_and_are_counted():
    found = rm_accuracy(torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [3.0, 1.0]]), ["a", "a", "a", "b"])
    assert found["accuracy"] == 50 and found["tie_rate"] == 25 and found["n"] == 4 and found["users"] == 2
    assert found["macro"] == pytest.approx(100 * (1 / 3 + 1) / 2) and found["each"] == {"a": "100", "b": "1"}
    with pytest.raises(PyargsError, match="no pairs"):
        rm_accuracy(torch.zeros(0, 2), [])
    with pytest.raises(PyargsError, match="not a number"):
        rm_accuracy(torch.tensor([[float("nan"), 1.0]]), ["a"])


@given(st.permutations(range(6)))
def test_the_order_of_pairs_does_not_matter(order):
    rewards = torch.tensor([[1.0, 0], [0, 1], [2, 2], [5, 1], [1, 5], [3, 2]])
    users = ["a", "b", "a", "c", "c", "b"]
    one, two = rm_accuracy(rewards[list(order)], [users[i] for i in order]), rm_accuracy(rewards, users)
    assert {u: sorted(e) for u, e in one.pop("each").items()} == {u: sorted(e) for u, e in two.pop("each").items()}
    assert one == two


def test_policy_accuracy_by_hand():
    scores = PairScores(
        logprob=torch.tensor([[-10.0, -4.0], [-6.0, -7.0]], dtype=torch.float64),
        step_reward=torch.tensor([[8.0, 1.0], [1.0, 2.0]], dtype=torch.float64),
        length=torch.tensor([[10, 2], [3, 3]]),
        reward=torch.zeros(2, 2),
        users=["a", "b"],
    )
    at = lambda w, **k: {name: found["accuracy"] for name, found in policy_accuracy(scores, w, **k).items()}  # noqa: E731
    assert at(0.0)["base"] == 100  # -1 > -2 and -2 > -2.33
    assert at(0.0)["paper"] == at(0.0)["sum"] == 50  # the longer answer loses on sums
    assert at(1.0)["paper"] == 50  # -2 > -3, -5 = -5: a tie is an error
    assert policy_accuracy(scores, 1.0)["paper"]["tie_rate"] == 50
    assert at(2.0, centre=1.0)["centred"] == 0  # 6 - 20 < -2 - 4; -4 - 6 < -3 - 6
    assert scores.mean_step_reward() == pytest.approx(12 / 18)


def test_scores_are_those_of_single_passes(tmp_path):
    from datasets import Dataset

    from pyargs.data.synthetic import tiny_lm as saved_lm
    from pyargs.lm.loading import load_lm
    from pyargs.lm.tokenize import encode_prompt, encode_response

    lm, tokenizer = load_lm(str(saved_lm(tmp_path / "lm")))
    model = reward_model(lm)
    model.backbone, model.tokenizer = lm.get_decoder(), tokenizer
    model.head.directions.data = torch.randn(3, lm.config.hidden_size)
    rows = Dataset.from_list(
        [
            {"user_id": "ann", "prompt": "one two", "chosen": "a b c", "rejected": "d"},
            {"user_id": "bob", "prompt": "one two", "chosen": "d", "rejected": "a b c"},
            {"user_id": "bob", "prompt": "other", "chosen": "x y", "rejected": "y x"},
        ]
    )
    found = pair_scores(model, lm, rows)
    for n, row in enumerate(rows):
        for side, text in enumerate((row["chosen"], row["rejected"])):
            prompt, response = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, text)
            with torch.no_grad():
                out = lm(torch.tensor([prompt + response]), output_hidden_states=True)
            logs = out.logits[0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1))
            user = model.users.rows([row["user_id"]]).expand(len(response))
            rewards = model.head(out.hidden_states[-1][0, len(prompt) :], user)
            assert found.length[n, side] == len(response)
            assert found.logprob[n, side].item() == pytest.approx(logs.sum().item(), abs=1e-3)
            assert found.reward[n, side].item() == pytest.approx(rewards[-1].item(), abs=1e-3)
            assert found.step_reward[n, side].item() == pytest.approx(rewards.sum().item(), abs=1e-3)


def test_rouge_equals_the_golden_values(shared_data):
    with gzip.open(shared_data / "metrics/rouge_golden.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 400
    for row in rows:
        got = rouge([row["candidate"]], [row["reference"]])
        for name in ("rouge1", "rougeL"):
            assert got[name] == pytest.approx(100 * row["no_stemmer"][name]["f"], abs=1e-9), row


def test_rouge_counts_empty_predictions():
    found = rouge(["the cat sat", " ", ""], ["the cat sat"] * 3)
    assert found["rouge1"] == pytest.approx(100 / 3) and found["empty"] == 2 and found["n"] == 3
    for predictions, references in ([], []), (["a"], []):
        with pytest.raises(PyargsError, match="one for each"):
            rouge(predictions, references)


def test_perplexity_of_tokens():
    lm = tiny_lm()
    prompts, answers = [[5, 6], [7]], [[8, 9, 10], []]
    logs = lm(torch.tensor([[5, 6, 8, 9, 10]])).logits[0].log_softmax(-1)
    want = math.exp(-(logs[1, 8] + logs[2, 9] + logs[3, 10]).item() / 3)
    assert perplexity(lm, prompts, answers) == pytest.approx(want, rel=1e-4)
    assert perplexity(lm, prompts, [[], []]) == math.inf
    # Several sets of answers to the same prompts are worth what each is by itself.
    sets = [answers, [[], []], [[11], [12, 13]], answers]
    assert perplexities(lm, prompts, sets) == pytest.approx([perplexity(lm, prompts, one) for one in sets], rel=1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A tiny random BERT that knows letters, saved as a folder; its tokenizer tells no limit, as many local ones."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_bertscore_of_the_same_text_is_100_and_of_nothing_0(bert):
    found = bertscore(["a bird in the hand", "", " ", "stones"], ["a bird in the hand", "words", "words", ""], model=bert)
    assert found["bertscore_each"][0] == pytest.approx(100, abs=1e-3) and found["bertscore_each"][1:] == [0, 0, 0]
    assert found["bertscore"] == pytest.approx(25, abs=1e-3) and found["model"] == f"{bert}, layer 3, not rescaled"
    assert bertscore(["", ""], ["a", "b"], model=bert)["bertscore"] == 0
    with pytest.raises(PyargsError, match="one for each"):
        bertscore(["a"], [])
    with pytest.raises(PyargsError, match="not possible"):
        bertscore(["a"], ["b"], model=bert, rescale=True)  # no baseline was ever computed for it
    with pytest.raises(PyargsError, match="not possible"):
        bertscore(["a"], ["b"], model="no/such-model")


def test_bertscore_by_hand_for_any_batch(bert):
    """Each token's best cosine in the other text, averaged over both directions; texts beyond the positions are cut."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()

    def states(text: str):
        ids = tokenizer(text, truncation=True, max_length=40, return_tensors="pt")["input_ids"]
        return torch.nn.functional.normalize(model(ids).last_hidden_state[0], dim=-1)

    texts = ["one", "two words", "three words here", "and a sentence of some more words, with a comma", "long " * 30]
    with torch.no_grad():
        want = []
        for text, other in zip(texts, texts[::-1], strict=True):
            cosine = states(text) @ states(other).T
            # [CLS] and [SEP] may be found, but do not count.
            precision, recall = cosine[1:-1].max(1).values.mean(), cosine[:, 1:-1].max(0).values.mean()
            want.append(200 * (precision * recall / (precision + recall)).item())
    assert bertscore(texts, texts[::-1], model=bert)["bertscore_each"] == pytest.approx(want, abs=1e-2)


class Longest:
    """A reward model that likes long answers of its user's favourite token."""

    def score(self, groups, users):
        favourite = {"a": 1, "b": 2}
        return [
            torch.tensor([r.count(favourite[user]) for r in several]) for (_, several), user in zip(groups, users, strict=True)
        ]


def test_win_rate_by_hand():
    prompts, users = [[9], [9], [9], [9]], ["a", "b", "a", "b"]
    ours, theirs = [[1, 1], [1, 1], [1], []], [[1], [2], [1], [2]]
    found = win_rate(Longest(), prompts, users, ours, theirs)
    assert found == {
        "win_rate": 25,
        "tie_rate": 25,
        "n": 4,
        "unscored": 1,
        "each": {"a": "10", "b": "00"},
        "tokens": [1.25, 1],
    }
    assert win_rate(Longest(), prompts, users, ours, ours)["win_rate"] == 0  # never over oneself
    swapped = win_rate(Longest(), prompts, users, theirs, ours)
    assert found["win_rate"] + swapped["win_rate"] + found["tie_rate"] + 25 * found["unscored"] == 100
    with pytest.raises(PyargsError, match="no answers"):
        win_rate(Longest(), [], [], [], [])
