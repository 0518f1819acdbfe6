"""Guided requests inside vLLM: `logits_processors=["pyargs.integrations.vllm.v1:Guide"]`, or v2 for Model Runner V2.

PYARGS_VLLM_MODEL names the model's folder. A request names its user in `SamplingParams.extra_args` (over HTTP `vllm_xargs`):
`pyargs_user`, `pyargs_reward_weight` (1 by default, raw) and `pyargs_num_candidates` (10 by default).
"""
