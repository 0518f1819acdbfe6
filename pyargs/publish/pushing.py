"""The upload: a staged model, and its users apart, to repositories of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pyargs.errors import PyargsError, described
from pyargs.publish.staging import FILES, stage


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    data: str,
    data_licence: str,
    users: str = "none",
    users_repo: str | None = None,
    salt: bytes | None = None,
    results: Sequence[str | Path] = (),
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> dict:
    """Pushes a saved model of any kind; others load it with `load_model(repo_id)`.

    folder: what `save_pretrained`, `pyargs train` or `pyargs adapt` wrote; the backbone itself is not pushed, its name is.
    data, data_licence: what it was trained on, and the licence of that, for the card.
    users: "none", "hashed" or "named", and salt, results, base_model as for `stage`. users_repo: a private repository for the
    users, who are then left out of the model's; `load_model(repo_id, users=users_repo)` puts them together.
    private: of the model's repository; token, revision, create_pr: as for `huggingface_hub.HfApi.upload_folder`.
    Returns what `stage` does and "repo", "users_repo": the addresses of the commits. What a repository held before stays in
    its history. Raises PyargsError before anything is uploaded where a repository that is to be private is public.
    """
    import huggingface_hub

    if users_repo is not None and users_repo == repo_id:
        raise PyargsError("users are pushed apart from their model: give users_repo another name")
    if create_pr and revision is not None:
        raise PyargsError("a pull request is made against the main branch: leave revision out, or create_pr")
    with TemporaryDirectory() as scratch:
        own, apart = Path(scratch, "model"), Path(scratch, "users") if users_repo is not None else None
        found = stage(
            folder,
            own,
            data=data,
            data_licence=data_licence,
            users=users,
            salt=salt,
            users_out=apart,
            results=results,
            base_model=base_model,
            repo=repo_id,
            users_repo=users_repo,
        )
        api = huggingface_hub.HfApi(token=token)
        targets = [("repo", repo_id, own, private), ("users_repo", users_repo, apart, True)][: 1 + (apart is not None)]
        for _, repo, _, hidden in targets:
            with described(f"'{repo}' cannot be made on the hub"):
                api.create_repo(repo, private=hidden, exist_ok=True)
                if hidden and not api.repo_info(repo).private:
                    raise PyargsError(
                        f"'{repo}' is there already, and public: make it private on the hub, or name another one"
                    )
                if revision is not None and not revision.startswith("refs/"):
                    api.create_branch(repo, branch=revision, exist_ok=True)
        for name, repo, place, _ in targets:
            with described(f"'{repo}' cannot be pushed to"):
                commit = api.upload_folder(
                    repo_id=repo,
                    folder_path=place,
                    commit_message="pyargs push",
                    revision=revision,
                    create_pr=create_pr,
                    delete_patterns=list(FILES),  # those of ours that the new model lacks
                )
            found[name] = commit.pr_url if create_pr else commit.commit_url
    return found
