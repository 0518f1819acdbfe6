"""What processes of `torchrun` do together, and one process alone: trainings whose losses and weights must agree.

torchrun --nproc-per-node 2 tests/several.py FOLDER LM
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

CASES = {
    "head": ("lore", {"freeze_backbone": True, "epochs": 2.0, "max_grad_norm": 0.01}),
    "tables": ("mpu", {"freeze_backbone": True, "epochs": 2.0, "hidden": 4}),
    "lora": ("lore", {"epochs": 1.0, "lora_lr": 1e-2}),
    "tables and lora": ("mpu", {"epochs": 1.0, "hidden": 4, "lora_lr": 1e-2, "max_grad_norm": 1.0}),
    "in turns": ("lore", {"epochs": 1.0, "lora_lr": 1e-2, "alternate": True}),
    "parts": ("global_rm", {"epochs": 1.0, "lora_lr": 1e-2, "accumulation": 2}),
}
"""Batches of 15 of 76 pairs: the last one has a single pair, so that one of two processes has none."""


def pairs():
    from pyargs.data import synthetic

    return synthetic.load(users=4, pairs=24, new_users=3, support=8, query=8)


def trained(lm: str, case: str) -> dict[str, torch.Tensor]:
    """Losses [steps] and trained parameters."""
    from pyargs.training import hooks, trainer

    name, fields = CASES[case]
    losses = []
    config = hooks.method(name).Config(backbone=lm, batch_size=15 if "accumulation" not in fields else 14, **fields)
    model = trainer.train(name, pairs(), config, note=lambda model, step, steps, loss: losses.append(loss))
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | found


def continued(lm: str, folder: Path) -> dict[str, torch.Tensor]:
    """As `trained` gives it, of a training with tables and LoRA that breaks off behind its third step and goes on."""
    from pyargs.training import hooks, trainer

    name, fields = CASES["tables and lora"]
    config, losses = hooks.method(name).Config(backbone=lm, batch_size=15, checkpoint_steps=1, **fields), []

    class Killed(BaseException):
        pass

    def note(model, step, steps, loss, last=3):
        losses.append(loss)
        if len(losses) == last + 1:  # the fourth step is lost
            raise Killed

    try:
        trainer.train(name, pairs(), config, note=note, checkpoints=folder)
    except Killed:
        losses.pop()
    model = trainer.train(name, pairs(), config, note=lambda *args: losses.append(args[-1]), checkpoints=folder)
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | found


def gradients(number: int) -> dict[str, torch.Tensor]:
    """Of one process, as they are added up with the others': dense, of a table's rows, and of a parameter that only the first
    process has used."""
    dense, table, once, never = (torch.nn.Parameter(torch.zeros(4, 2)) for _ in range(4))
    dense.grad = torch.full((4, 2), number + 1.0)
    rows = torch.tensor([[1, 1, 3]] if number == 0 else [[3]])
    table.grad = torch.sparse_coo_tensor(rows, torch.ones(rows.shape[1], 2) * (number + 1), (4, 2))
    once.grad = torch.ones(4, 2) if number == 0 else None
    return {"dense": dense, "table": table, "once": once, "never": never}


def command(lm: str, folder: Path) -> list[str]:
    words = [
        "train",
        "mpu",
        "--data",
        "synthetic",
        "--backbone",
        lm,
        "--epochs",
        "0.1",
        "--hidden",
        "4",
        "--checkpoint-steps",
        "1",
    ]
    return [*words, "--out", str(folder / "model")]


def refusal_of_parts(lm: str) -> str:
    """What an engine says of a policy that FSDP has split over the processes, and that each of them can still run."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import pyargs

    model, _ = pyargs.load_lm(lm, device="cpu")
    before = model(torch.tensor([[5, 6, 7]])).logits
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert torch.allclose(model(torch.tensor([[5, 6, 7]])).logits, before, atol=1e-5)
    try:
        pyargs.Engine(model)
    except pyargs.PyargsError as error:
        return str(error)
    return "nothing"


def main() -> None:
    from pyargs.cli import main as pyargs
    from pyargs.training import processes

    folder, lm = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    processes.start()
    toys = gradients(processes.number())
    processes.add_up(toys.values())
    assert toys["never"].grad is None and toys["table"].grad.is_sparse
    torch.save(
        {name: p.grad.to_dense() for name, p in toys.items() if p.grad is not None}, folder / f"toys-{processes.number()}.pt"
    )
    for case in CASES:
        torch.save(trained(lm, case), folder / f"{case}-{processes.number()}.pt")
    torch.save(continued(lm, folder / "checkpoints"), folder / f"continued-{processes.number()}.pt")
    assert pyargs(command(lm, folder)) == 0
    processes.total(0)
    assert pyargs(command(lm, folder)) == 0  # already done, in both
    (folder / f"refused-{processes.number()}.txt").write_text(refusal_of_parts(lm))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
