"""Checkpoints are whole or not there, and a stop before the first step saves none."""

import errno
import os

import lightning.pytorch as pl
import pytest
import torch

from gps_guidance.lift.callbacks import AtomicCheckpointIO, GracefulStop, _Plain


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_reports_a_full_disk_as_an_oserror():
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        torch.save({"a": torch.zeros(10)}, _Plain(file))
    assert caught.value.errno == errno.ENOSPC


def test_checkpoints_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.ckpt"
    io = AtomicCheckpointIO()
    whole = {"state_dict": {"a": torch.arange(3)}, "epoch": 0, "global_step": 1}
    io.save_checkpoint(whole, path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.arange(3))
    with pytest.raises(AttributeError):  # a local function cannot be pickled
        io.save_checkpoint({**whole, "extra": lambda: None}, path)
    assert io.load_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_without_a_first_step_there_is_nothing_to_save(tmp_path):
    stop = GracefulStop(tmp_path / "last.ckpt")
    stop.request()
    stop.on_train_batch_end(pl.Trainer(logger=False, enable_checkpointing=False))
    assert not stop.saved
