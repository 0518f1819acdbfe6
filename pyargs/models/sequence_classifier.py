"""A sequence classifier of transformers as the parts of a RewardModel: decoder, score layer, users who weigh labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyargs.errors import PyargsError, did_you_mean
from pyargs.heads import linear
from pyargs.lm.cache import alike, evaluating
from pyargs.lm.loading import fingerprint, load_classifier
from pyargs.types import Users

METHOD = "sequence_classifier"


def parts(given: str | Path | nn.Module, tokenizer, users, *, dtype, device) -> tuple[nn.Module, object, linear.Head, dict]:
    """Backbone, tokenizer, head and `about` of the RewardModel; arguments as for `RewardModel.from_sequence_classifier`."""
    if isinstance(given, nn.Module):
        if dtype is not None or device is not None:
            raise PyargsError("a classifier in memory keeps its dtype and device: leave both out, or move it before")
        tokenizer = tokenizer if tokenizer is not None else getattr(given, "tokenizer", None)
        if tokenizer is None:
            raise PyargsError(
                "a classifier in memory comes without its tokenizer, which has the chat template: pass tokenizer="
            )
        model, name = given, given.name_or_path or None
    else:
        model, own = load_classifier(str(given), dtype=dtype or torch.float32, device=device)
        tokenizer, name = tokenizer if tokenizer is not None else own, str(given)
    score = score_layer(model)
    labels = [model.config.id2label[place] for place in range(len(score.weight))]
    if len(set(labels)) < len(labels):
        raise PyargsError(f"two labels of this classifier have one name ({', '.join(labels)}): mend id2label of its config")
    head = linear.Head(score.in_features, len(labels), _users(model.config.problem_type, labels, users))
    head.directions.data = score.weight.detach().float().clone()
    backbone = model.get_decoder()
    about = {
        "method": METHOD,
        "fields": {},
        "labels": labels,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(backbone),
        "reward_std": {},  # measured when somebody asks for a strength
    }
    return backbone, tokenizer, head.to(score.weight.device), about | ({"backbone": name} if name else {})


def score_layer(model: nn.Module) -> nn.Linear:
    """The layer that makes logits of a classifier's last state. Raises PyargsError where they are anything else than that."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    kind, config = type(model).__name__, getattr(model, "config", None)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        raise PyargsError(f"a {kind} is no sequence classifier of transformers (AutoModelForSequenceClassification)")
    score = getattr(model, "score", None)
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if not decoder or not isinstance(score, nn.Linear) or not _causal(model.get_decoder()):
        raise PyargsError(
            f"a {kind} is no decoder with one linear layer 'score' behind it: what was read of a text that goes on can not "
            "be kept, as with an encoder. Take a classifier of a decoder family, or RewardModel.from_function, which is slower"
        )
    if score.bias is not None and score.bias.any():
        raise PyargsError(f"the score layer of this {kind} has a bias, which changes no choice but every reward: set it to 0")
    return score


@torch.no_grad()
def _causal(decoder: nn.Module) -> bool:
    """Whether a token's state is the same whatever comes behind it. Tried on a few tokens."""
    ids = torch.arange(8, device=decoder.device)[None] % decoder.config.get_text_config(decoder=True).vocab_size
    with evaluating(decoder):
        return alike(decoder(ids[:, :5]).last_hidden_state, decoder(ids).last_hidden_state[:, :5])


def _users(problem: str | None, labels: list[str], users: Mapping[str, Mapping[str, float]] | None) -> Users:
    """Users who mix labels. Nobody where one label is for everyone."""
    known = None, "regression", "multi_label_classification", "single_label_classification"
    if problem not in known:
        raise PyargsError(f"problem_type of the classifier's config is {problem!r}, and pyargs knows {', '.join(known[1:])}")
    if users is None and len(labels) == 1 and problem != known[3]:
        return Users()
    if users is not None and not users:
        raise PyargsError("users is empty: name at least one user with the weights of the labels, or leave it out")
    weights = {label: {label: 1.0} for label in labels} if users is None else users
    mixture = torch.stack([_row(user, own, labels) for user, own in weights.items()])
    if problem == known[3] and (lame := (mixture.sum(1).abs() > 1e-6).nonzero().flatten().tolist()):
        example = {labels[0]: 1.0, labels[-1]: -1.0} if len(labels) > 1 else "none with one label"
        raise PyargsError(
            f"the labels of a {problem} mean something only beside each other, so that a user's weights must sum to 0; those "
            f"of '{list(weights)[lame[0]]}' do not: pass users={{'someone': {example}}}, say"
        )
    return Users(weights, mixture=mixture)


def _row(user: str, weights: Mapping[str, float], labels: list[str]) -> Tensor:
    """A user's weight of each label, float32 [K]."""
    row = dict.fromkeys(labels, 0.0)
    if not isinstance(weights, Mapping):
        raise PyargsError(
            f"the weights of user '{user}' are a dict of labels, such as {{{labels[0]!r}: 1.0}}, got {weights!r:.60}"
        )
    for label, weight in weights.items():
        if label not in row:
            raise PyargsError(f"the classifier has no label '{label}' (user '{user}')." + did_you_mean(str(label), labels))
        row[label] = weight
    try:
        found = torch.tensor([float(weight) for weight in row.values()], dtype=torch.float32, device="cpu")
    except (TypeError, ValueError):
        raise PyargsError(f"the weights of user '{user}' must be numbers, got {dict(weights)!r:.80}") from None
    if not found.isfinite().all():
        raise PyargsError(f"the weights of user '{user}' must be finite, got {dict(weights)!r:.80}")
    return found
