"""Policy accuracy (eqs. 3-6 of the paper): how often the decoder's own score ranks the chosen response first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyargs.metrics.rm_accuracy import compare


@dataclass
class PairScores:
    """What every ranking of N pairs needs; index 0 is the chosen response, 1 the rejected one.

    logprob float64 [N, 2]: sum of log pi over the response tokens (no stop token); step_reward float64 [N, 2]: sum of what
    a decoder would have added at each token; length int64 [N, 2]: tokens; reward float32 [N, 2]: sequence rewards; users: N
    ids.
    """

    logprob: Tensor
    step_reward: Tensor
    length: Tensor
    reward: Tensor
    users: list[str]

    def mean_step_reward(self) -> float:
        """Mean over all tokens: what "centred" subtracts. Take it from the seen users' held-out pairs."""
        return (self.step_reward.sum() / self.length.sum()).item()


def policy_accuracy(scores: PairScores, weight: float, *, centre: float = 0.0) -> dict[str, dict]:
    """Accuracies by name; each is a dict of `rm_accuracy.compare`.

    base: mean log pi (eq. 4), the policy alone. paper: sum of log pi + w r, not divided by the length, as eqs. 5-6 have it.
    centred: the same with r - centre, since a constant in r would otherwise count once per token. all: mean of log pi + w r,
    comparable with base at every weight. sum: the log-likelihood alone, which is what `paper` gives at w = 0.
    """
    guided = scores.logprob + weight * scores.step_reward
    ranked = {
        "base": scores.logprob / scores.length,
        "paper": guided,
        "centred": guided - weight * centre * scores.length,
        "all": guided / scores.length,
        "sum": scores.logprob,
    }
    return {name: compare(score[:, 0], score[:, 1], scores.users) for name, score in ranked.items()}


def pair_scores(model, policy, dataset) -> PairScores:
    """PairScores of a dataset's rows under a RewardModel or TokenReward and a policy.

    Where the policy has a tokenizer of its own (`load_lm` leaves it there), each model reads the responses in its own tokens.
    Log-probs of the policy are computed once for the same weights and texts and kept in the user's cache.
    """
    from pyargs.lm.loading import same_tokenizer
    from pyargs.scoring import encode_pairs, pair_logprobs

    own, tokenizer = getattr(policy, "tokenizer", None), model.tokenizer
    if own is not None and not same_tokenizer(own, tokenizer):
        tokenizer = own
    logprob, length = pair_logprobs(policy, *encode_pairs(tokenizer, dataset, model.about.get("max_length")))
    step_reward, reward = model.pair_scores(dataset)
    return PairScores(logprob, step_reward, length, reward, list(dataset["user_id"]))
