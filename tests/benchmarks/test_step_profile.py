import sys

import pytest
import step_profile
import torch
from torch import nn

from kcfi.models import load
from kcfi.processing import describer_kcfi


class Model(nn.Module):
    """Two parts whose matrix products are known."""

    def __init__(self):
        super().__init__()
        self.model, self.lm_head = nn.Module(), nn.Linear(300, 200, bias=False)
        self.model.vision_tower = nn.Linear(100, 300, bias=False)

    def forward(self, inputs):
        return self.lm_head(self.model.vision_tower(inputs).relu())


def test_forward_and_backward_time_goes_to_the_part_that_computed(monkeypatch):
    parts = {"vision tower": "model.vision_tower", "output layer": "lm_head"}
    monkeypatch.setattr(step_profile, "PARTS", parts)
    model = Model()
    step_profile.mark_parts(model)
    seconds = step_profile.seconds_of(lambda: model(torch.ones(50, 100)).sum().backward())
    # a product forwards; backwards one for the weights, and one for the inputs of the second layer
    spent = {part for part, name in seconds if name == "aten::mm"}
    assert spent == {"vision tower", "output layer"}
    assert {part for part, name in seconds if name == "autograd::engine::evaluate_function: MmBackward0"} == spent
    assert {part for part, name in seconds if "relu" in name} == {step_profile.REST}


def test_the_table_has_shares_of_the_time_and_of_the_peak(monkeypatch):
    monkeypatch.setattr(step_profile, "PARTS", {"vision tower": "v", "language model": "l"})
    spent = {("vision tower", "aten::mm"): 3.0, ("language model", "aten::bmm"): 0.5, ("rest", "step"): 0.5}
    lines = step_profile.table({"ours": step_profile.Counter(spent)}, {"ours": 4_000_000_000}, peak=2e9).splitlines()
    assert lines[2:6] == [
        "| vision tower | 3.00 s, 75% |",
        "| language model | 0.50 s, 12% |",
        "| rest | 0.50 s, 12% |",
        "| **whole** | 4.00 s, 50% of the matmul peak |",
    ]
    assert "`aten::mm` in vision tower 75%" in lines[-1]


@pytest.mark.parametrize(("options", "title"), [([], "1 pairs x 5 captions"), (["--folder"], "1 pairs")])
def test_steps_and_folders_are_profiled(options, title, detector, monkeypatch, capsys):
    model, processor = load(str(detector))
    model.model.language_model.requires_grad_(False)
    monkeypatch.setattr(step_profile, "build", lambda case: (model.train(), processor))
    monkeypatch.setattr(step_profile, "build_reader", lambda case: (model, processor))
    parts = {"vision tower": "model.vision_tower", "language model": "model.language_model"}
    monkeypatch.setattr(step_profile, "PARTS", parts)
    monkeypatch.setattr(describer_kcfi, "LONGEST", 4)
    monkeypatch.setattr(step_profile, "matmul_peak", lambda dtype: 1e12)
    monkeypatch.setattr(sys, "argv", ["step_profile.py", "--pairs", "1", *options])
    tables = []  # the printed shares of so small a tower are rounded, to 0 % beside a busy disk
    table = step_profile.table
    monkeypatch.setattr(step_profile, "table", lambda *found: tables.append(found[0]) or table(*found))
    step_profile.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"kcfi-tiny, fp32, {title};") and "\n| vision tower |" in printed
    for spent in tables[0].values():
        tower = sum(seconds for (part, _), seconds in spent.items() if part == "vision tower")
        assert 0 < tower < spent.total()
    assert len(tables[0]) == 2
