"""States on disk: written beside training, as often as that is cheap, whole or not at all, and read
without a pickle.
"""

from __future__ import annotations

import pickle
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from train.test_parallel import launch, result
from train.test_training import arguments, batches_of, student, weights

from compress.distill.batches import make_loss
from compress.distill.losses import Mix
from compress.errors import Interrupted
from compress.train import state
from compress.train.loop import train
from compress.train.state import Saver


def run(context, work, **changes):
    """Six steps on the tiny teacher; its weights behind them."""
    model = student(context)
    train(model, make_loss(Mix(1.0, 0.1)), batches_of(context), **arguments(work, 6, **changes))
    return weights(model)


def stopped(context, work):
    """The same, stopped by a signal in the third step."""
    batches = batches_of(context)

    def interrupting(step, micro):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return batches(step, micro)

    with pytest.raises(Interrupted):
        train(student(context), make_loss(Mix(1.0, 0.1)), interrupting, **arguments(work, 6))


def test_states_written_beside_training_change_no_bit_of_it(context, tmp_path, monkeypatch):
    expected = run(context, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*"))
    monkeypatch.setattr(Saver, "due", property(lambda saver: True))
    made = run(context, tmp_path / "b")
    assert all(torch.equal(expected[name], p) for name, p in made.items())
    (last,) = (tmp_path / "b").glob("state-*")
    assert last.name == "state-00000005"
    assert {file.name for file in last.iterdir()} == {"state.json", "tensors-0.safetensors"}


def test_the_next_state_waits_for_twenty_times_what_the_last_one_took(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    saver = Saver(tmp_path, 1)
    for seconds, pause in ((0.0, 20.0), (0.5, 20.0), (3.0, 60.0), (60.0, 1200.0)):
        saver.seconds, saver.begun = seconds, now[0]
        now[0] += pause - 0.01
        assert not saver.due
        now[0] += 0.02
        assert saver.due


def test_the_copy_is_of_the_moment_when_a_save_began(tmp_path, monkeypatch):
    slow = state.save_file

    def late(*arguments, **named):
        time.sleep(0.2)
        slow(*arguments, **named)

    monkeypatch.setattr(state, "save_file", late)
    weight, saver = torch.zeros(3), Saver(tmp_path, 1)
    saver.begin({"step": 1}, {"param/w": (weight, None)})
    weight.fill_(7)
    saver.wait()
    assert not load_file(tmp_path / "state-00000001/tensors-0.safetensors")["param/w"].any()
    assert saver.seconds >= 0.2


def test_without_room_for_a_copy_training_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "ROOM", 1e15)
    saver = Saver(tmp_path, 1)
    saver.begin({"step": 3}, {"param/w": (torch.ones(2), None)})
    assert saver.thread is None and (tmp_path / "state-00000003/state.json").is_file()


def test_a_full_disk_is_said_and_the_older_state_stays(context, tmp_path, monkeypatch):
    work, written = tmp_path / "w", []

    def full(*given, **named):
        written.append(1)
        if len(written) == 3:
            raise OSError("no space left on device")
        return real(*given, **named)

    real = state.save_file
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        patch.setattr(Saver, "due", property(lambda saver: True))
        with pytest.raises(OSError, match="no space left"):
            run(context, work)
    (kept,) = work.glob("state-*")
    assert kept.name == "state-00000002"
    expected = run(context, tmp_path / "whole")
    assert all(torch.equal(expected[name], p) for name, p in run(context, work).items())


def test_a_kill_in_the_middle_of_a_save_leaves_the_state_before_it(tiny_teacher, tmp_path):
    codes, outputs = launch("none", tmp_path / "whole", tiny_teacher, world=1)
    assert codes == [0], outputs
    codes, outputs = launch("none-midsave", tmp_path / "b", tiny_teacher, stop=9, world=1)
    assert codes == [-9], outputs
    (kept,) = (tmp_path / "b/work").glob("state-*")
    assert kept.name == "state-00000001" and (tmp_path / "b/work/.state.part").is_dir()
    codes, outputs = launch("none", tmp_path / "b", tiny_teacher, world=1)
    assert codes == [0] and "resuming at step 1" in outputs[0], outputs
    expected = result(tmp_path / "whole")[1]
    assert all(torch.equal(p, expected[name]) for name, p in result(tmp_path / "b")[1].items())


def test_nothing_is_unpickled_when_a_run_goes_on(context, tmp_path, monkeypatch):
    expected = run(context, tmp_path / "whole")
    stopped(context, tmp_path / "w")

    def refused(*_, **__):
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refused)
    monkeypatch.setattr(torch, "load", refused)
    made = run(context, tmp_path / "w")
    assert all(torch.equal(expected[name], p) for name, p in made.items())


def test_the_first_process_does_not_wait_for_a_part_that_nobody_can_write(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 2)
    saver.begin({"step": 1}, {"param/w": (torch.ones(2), None)})
    assert saver.thread.is_alive() and not saver.due
    (tmp_path / ".state.part" / state.FAILED).touch()
    with pytest.raises(OSError, match="a process can't write its part of the state"):
        saver.wait()
    saver.begin({"step": 1}, {"param/w": (torch.ones(2), None)})
    saver.close()
    assert not saver.thread.is_alive() and not list(tmp_path.glob("state-*"))
