"""The table of docs/efficiency.md is what the cost of each switch is."""
from configs import efficient_40pct
from effmodels.models import cost
from tests.docs.blocks import table


def test_the_table_of_switches():
    rows = table("docs/efficiency.md", "## The switches of `configs/efficient_40pct.py`")
    arguments = [None if row["argument"] == "none" else row["argument"].strip("`:") for row in rows]
    assert set(arguments) == {None, "dense", *efficient_40pct.SWITCHES}
    for arg, row in zip(arguments, rows):
        model = efficient_40pct.get_config(arg).model.to_dict()
        at = {length: cost(model, length) for length in (2048, 8192, 32768)}
        want = [at[2048].params / 1e6, *(c.train_flops_per_token / 1e9 for c in at.values()), at[8192].decode_state_bytes / 1e6]
        assert list(row.values())[2:] == [f"{value:,.1f}" for value in want], arg
