"""Seeds, optimisers and schedulers of the 3D system."""

import pytest
import torch

from gps_guidance.lift.system import build_optimizer, build_scheduler, seed_step


def test_seed_step_depends_on_both_numbers_and_nothing_else():
    def draw(seed, step):
        seed_step(seed, step)
        return torch.rand(2).tolist()

    first = draw(0, 1)
    torch.rand(5)
    assert draw(0, 1) == first
    assert len({tuple(draw(seed, step)) for seed in range(4) for step in range(4)}) == 16
    assert draw(-1, 0) != draw(1, 0)


def test_optimiser_groups_and_nested_schedulers():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    optimizer = build_optimizer({"name": "AdamW", "args": {"lr": 1.0},
                                 "params": {"0": {"lr": 0.5}, "1.bias": None}}, module)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1.0]
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 1]
    built = build_scheduler({"name": "SequentialLR", "interval": "step", "milestones": [1],
                             "schedulers": [{"name": "ConstantLR", "args": {"factor": 0.1}},
                                            {"name": "ExponentialLR", "args": {"gamma": 0.5}}]},
                            optimizer)
    assert built["interval"] == "step"
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1)
