"""What cells take, from those that are done."""

from __future__ import annotations

from experiments import reproduce


def test_measured_cells_tell_the_hours():
    import pyargs.data
    from experiments.estimate import Left, plan, sizes, tokens, trains

    size = sizes(pyargs.data.load("synthetic"))
    settings = reproduce.PROFILES["smoke"]["sets"]["synthetic"]
    count = {name: tokens(row, settings, size) for name, row in settings["rows"].items()}
    assert count["LoRE, LoRA"] > count["LoRE"] > 0 and count["ICL"] > count["Zero-Shot"]
    assert {trains(row) for row in settings["rows"].values()} == {"nothing", "head", "language model"}
    measured = [("head", 1000, 10.0), ("nothing", 1000, 1.0)]
    known, like, other = (
        Left("a", ("train",), "head", 1000, 3600.0),
        Left("b", ("train",), "head", 360_000, None),
        Left("c", ("decode",), "nothing", 3_600_000, None),
    )
    found = plan([known, like, other], measured)
    assert found["tokens_per_second"] == {"head": 100, "nothing": 1000} and found["cells_without_estimate"] == 0
    assert [line["minutes"] for line in found["cells"]] == [60, 60, 60] and found["hours"] == 3.0
    assert found["fits_30_minutes_of_a_gpu"] is False and plan([known], measured, workers=2)["hours"] == 0.5
    lora = plan([known, Left("d", ("train",), "language model", 5, None), Left("e", ("train",), "head", 0, None)], measured)
    assert lora["hours"] == 1.0 and lora["cells_without_estimate"] == 2 and lora["fits_30_minutes_of_a_gpu"] is None
    nothing = plan([like], [])
    assert nothing["hours"] is None and nothing["note"].endswith("200 tokens/s would fit 30 minutes")
    assert "note" not in plan([Left("e", ("train",), "head", 0, None)], [])
