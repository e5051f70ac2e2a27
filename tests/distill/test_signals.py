"""The teacher signal: unbiased with the predicted spread, exact where it says so, refused by name
when it is another one or damaged.
"""

from __future__ import annotations

import json

import pytest
import torch

from compress.distill.batches import make_batches
from compress.distill.fused_head import head_loss
from compress.distill.losses import Dense, Mix
from compress.distill.schemes import Scheme, decode, encode, sample
from compress.distill.settings import Signal
from compress.distill.signals import Signals, as_target
from compress.errors import ResourceError
from compress.models.checkpoint import load_model
from compress.models.head import Head
from compress.stages.training import open_source

L, H, V = 11, 6, 300


def teacher(vocabulary=V):
    torch.manual_seed(0)
    return torch.randn(L, H), Head(torch.randn(vocabulary, H) * 0.8)


def draw(hidden, head, scheme, seed=0):
    return decode([encode(hidden, head, scheme, torch.Generator().manual_seed(seed))], scheme)


def test_samples_are_unbiased_with_no_more_than_the_multinomial_spread():
    torch.manual_seed(0)
    logits, tau, trials = 2 * torch.randn(1, V), 1 / 16, 4000
    p = logits.softmax(-1)[0].double()
    mean = torch.zeros(V, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(trials):
        made = sample(logits.clone(), tau, torch.rand(1, generator=generator, dtype=torch.float64))
        heads, draws = int(made["heads"]), int(made["draws"])
        rest = made["rest"].double()[0]
        weights = torch.cat([made["probs"].double(), (rest / draws).expand(draws)])
        mean.index_add_(0, made["ids"], weights / trials)
    tail = torch.where(p >= tau, 0.0, p)
    spread = (tail.sum() / draws * tail / trials).sqrt()
    assert ((mean - p).abs() <= 4.5 * spread + 1e-3 * p.clamp_min(1e-4)).all()
    assert heads == int((p >= tau).sum()) and draws == -(-float(tail.sum()) // tau)


@pytest.mark.parametrize("vocabulary", [40, 64, 300, 70_000])
def test_sampled_weights_add_up_to_one_and_heads_are_exact(vocabulary):
    hidden, head = teacher(vocabulary)
    batch = draw(hidden, head, Scheme("sampled", threshold=1 / 20))
    p = head.logits(hidden).softmax(-1)
    assert batch["ids"].max() < vocabulary
    torch.testing.assert_close(batch["probs"].sum(-1), torch.ones(L), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch["entropy"], -(p * p.log()).sum(-1), rtol=1e-3, atol=1e-3)
    for token in range(L):
        kept = dict(zip(batch["ids"][token].tolist(), batch["probs"][token].tolist(), strict=True))
        for i in (p[token] >= 1 / 20).nonzero()[:, 0].tolist():
            assert kept[i] == pytest.approx(float(p[token, i]), rel=1e-3)


def test_ids_beyond_two_bytes_come_back():
    head, wanted = Head(torch.zeros(70_000, 1)), [65_535, 65_536, 69_999]
    head.weight_VH[wanted] = torch.tensor([[12.0], [13.0], [14.0]])
    batch = draw(torch.ones(L, 1), head, Scheme())
    p = head.logits(torch.ones(1, 1)).softmax(-1)[0]
    for ids, probs in zip(batch["ids"].tolist(), batch["probs"].tolist(), strict=True):
        kept = dict(zip(ids, probs, strict=True))
        assert [kept[i] for i in wanted] == pytest.approx(p[wanted].tolist(), rel=1e-3)


def test_the_mean_gradient_of_64_draws_is_within_1_5_predicted_errors_of_the_full_one():
    torch.manual_seed(2)
    hidden, head = teacher()
    student_h, student_w = torch.randn(L, H), torch.randn(V, H)
    labels, mask = torch.zeros(L, dtype=torch.long), torch.ones(L, dtype=torch.bool)

    def gradient(target):
        h = student_h.clone().requires_grad_()
        head_loss(h, Head(student_w), labels, mask, target, Mix()).backward()
        return h.grad.flatten().double()

    exact = gradient(Dense(hidden, head))
    draws = torch.stack(
        [
            gradient(as_target(draw(hidden, head, Scheme("sampled", threshold=1 / 10), seed), None))
            for seed in range(64)
        ]
    )
    predicted = (draws.var(0).sum() / 64).sqrt()
    assert (draws.mean(0) - exact).norm() < 1.5 * predicted
    assert predicted / exact.norm() < 0.1


@pytest.mark.parametrize("certain", [0.9998, 0.99995, 0.51])
def test_what_heads_leave_is_kept_whatever_their_own_rounding(certain):
    p = torch.cat(
        [
            torch.tensor([certain, 0.995 - certain if certain < 0.9 else 0.0], dtype=torch.float64),
            torch.full((298,), 0.0),
        ]
    )
    p[2:] = (1 - p.sum()) / 298
    hidden, head, draws = torch.ones(L, 1), Head(p.clamp_min(1e-30).log().float()[:, None]), 200
    total = torch.zeros(2, dtype=torch.float64)
    for seed in range(draws):
        batch = draw(hidden, head, Scheme(), seed)
        weights, is_head = batch["probs"].double(), batch["ids"] < 2
        total += torch.stack([(weights * at).sum(-1).mean() for at in (is_head, ~is_head)]) / draws
        torch.testing.assert_close(
            weights.sum(-1), torch.ones(L, dtype=torch.float64), rtol=1e-6, atol=1e-6
        )
    rest = float(p[2:].sum())
    assert float(total[1]) == pytest.approx(rest, rel=2e-3)
    assert float(total[0]) == pytest.approx(1 - rest, abs=1e-3 * rest + 1e-7)


def test_the_kl_of_a_certain_teacher_to_itself_is_not_negative():
    logits = torch.full((1, V), -14.2)  # the first has 0.9998
    logits[0, 0] = 0.0
    hidden, head = torch.ones(L, 1), Head(logits.T)
    target = as_target(draw(hidden, head, Scheme("sampled")), None)
    loss = head_loss(hidden, head, torch.zeros(L).long(), torch.ones(L).bool(), target, Mix())
    p = logits.double().softmax(-1)[0]
    assert p[0] == pytest.approx(0.9998, abs=1e-5)
    assert float(loss) / L == pytest.approx(
        0.0, abs=1e-5 - float((p * p.log()).sum()) * 5e-4
    )  # entropy is kept in fp16


def test_hidden_states_in_int8_keep_the_kl_below_1e_3():
    hidden, head = teacher()
    kept = draw(hidden, head, Scheme("hidden"))["teacher_hidden"]
    log_p, log_q = head.logits(hidden).log_softmax(-1), head.logits(kept).log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).max() < 1e-3


def test_a_tempered_sample_is_one_of_the_tempered_teacher():
    hidden, head = teacher(40)
    batch, p = (
        draw(hidden, head, Scheme(temperature=3.0)),
        (head.logits(hidden) / 3).softmax(-1),
    )
    torch.testing.assert_close(batch["entropy"], -(p * p.log()).sum(-1), rtol=1e-3, atol=1e-3)
    heads = p >= Scheme().threshold
    kept = torch.zeros(L, 40).scatter_add_(1, batch["ids"], batch["probs"])
    assert heads.any()
    torch.testing.assert_close(kept[heads], p[heads], rtol=1e-3, atol=1e-3)


def open_signals(context, folder, scheme=None, **changes):
    options = {
        "seed": 0,
        "precision": "fp32",
        "log": lambda message: None,
        "own_folder": True,
    } | changes
    data = options.pop("data", None) or context.text()
    return Signals(
        folder, options.pop("teacher", context.teacher), data, scheme or Scheme(), **options
    )


@pytest.mark.parametrize("name", ["sampled", "hidden"])
def test_what_is_read_is_what_was_made(context, tmp_path, name):
    signals = open_signals(context, tmp_path / "s", Scheme(name))
    signals.make(20)
    rows = [17, 3]
    again = open_signals(context, tmp_path / "s", Scheme(name))
    for key, tensor in signals.read(rows).items():
        assert torch.equal(tensor, again.read(rows)[key]) and len(tensor) == 2 * context.seq_len


def test_two_processes_make_the_shards_of_one(context, tmp_path, monkeypatch):
    open_signals(context, tmp_path / "one").make(64)
    monkeypatch.setattr("compress.train.parallel.world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("compress.train.parallel.rank", lambda rank=rank: rank)
        open_signals(context, tmp_path / "two").make(64)
        assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2 * (
            rank + 1
        )  # every second one each
    names = [
        sorted(p.name for p in (tmp_path / which).glob("*.safetensors")) for which in ("one", "two")
    ]
    assert names[0] == names[1] and len(names[0]) == 4


def test_a_teacher_in_int8_is_moved_to_the_device(context, tmp_path, monkeypatch):
    from compress.distill import signals as signal

    monkeypatch.setattr(signal, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(signal, "load_model", lambda path, dtype, load: load_model(path, dtype))
    model, head = open_signals(context, tmp_path / "s", load="int8")._open_teacher()
    assert model.device.type == head.weight_VH.device.type == "meta"


def test_listings_are_read_again_once_every_process_has_written(context, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    done = []
    monkeypatch.setattr("compress.train.parallel.wait", lambda: done.append("waited"))
    monkeypatch.setattr(
        MemoryFileSystem, "invalidate_cache", lambda self, path=None: done.append(path)
    )
    signals = open_source(
        Signal(path="memory://listed"),
        context,
        context.teacher,
        context.text(),
        16,
        context.teacher,
    )
    assert done == ["waited", signals.folder]


def test_making_goes_on_where_it_stopped(context, tmp_path):
    signals = open_signals(context, tmp_path / "s")
    signals.make(16)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("0*.safetensors")}
    signals.make(48)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("0*.safetensors")}
    assert len(first) == 1 and len(after) == 3 and first.items() <= after.items()


def test_shards_can_lie_on_any_file_system_that_fsspec_opens(context):
    signals = open_signals(context, "memory://signals-test")
    signals.make(16)
    assert (
        open_signals(context, "memory://signals-test").read([3])["probs"].shape[0]
        == context.seq_len
    )


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_shard_is_refused_by_name(context, tmp_path, damage):
    open_signals(context, tmp_path / "s").make(16)
    shard = next((tmp_path / "s").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data if damage == "flip" else data[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged.*delete it"):
        open_signals(context, tmp_path / "s").read([0])


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("scheme", {"scheme": Scheme("hidden")}),
        ("threshold", {"scheme": Scheme(threshold=0.1)}),
        ("seed", {"seed": 1}),
        ("precision", {"precision": "bf16"}),
    ],
)
def test_another_signal_is_refused_naming_the_field(context, tmp_path, field, changes):
    open_signals(context, tmp_path / "s")
    with pytest.raises(
        ValueError, match=f"was made with another {field}: .*give signal.path an empty folder"
    ):
        open_signals(context, tmp_path / "s", **changes)


@pytest.mark.parametrize("field", ["teacher", "tokenizer", "data"])
def test_another_teacher_tokenizer_or_text_is_refused_naming_it(context, tmp_path, field):
    open_signals(context, tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta | {field: "another"}))
    with pytest.raises(ValueError, match=f"was made with another {field}"):
        open_signals(context, tmp_path / "s")


def test_a_disk_too_small_for_all_shards_is_refused_after_the_first(context, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "compress.distill.signals.shutil.disk_usage",
        lambda path: type("usage", (), {"free": 1000})(),
    )
    with pytest.raises(
        ResourceError, match="the teacher signal needs .* GB are free; set signal.path"
    ):
        open_signals(context, tmp_path / "s").make(160)


def test_a_4_bit_teacher_makes_a_signal_close_to_the_whole_one(context, tmp_path):
    pytest.importorskip("bitsandbytes")
    likely = []  # the eight most probable ids of every token, and their logits
    for load in ("plain", "nf4"):
        signals = open_signals(context, tmp_path / load, Scheme("hidden"), load=load)
        likely.append(signals.teacher_head.logits(signals.read([0])["teacher_hidden"]).topk(8))
    whole, packed = likely
    same = (whole.indices[:, :1] == packed.indices).any(-1).float().mean()
    assert same > 0.9 and not torch.equal(whole.values, packed.values)


def test_a_signal_that_memory_holds_is_read_in_the_order_of_one_permutation(context):
    signals = signals_of(context)
    assert signals.windows(16 * 64) is None and signals.windows(16 * 64 + 1) == (16, 16)
    size = len(context.text().ids)
    expected = []
    for epoch in (0, 1):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + epoch)
        expected += torch.randperm(size, generator=generator).tolist()
    assert context.text().rows(7, 0, 2 * size, 10**9) == expected


def test_a_longer_signal_is_read_once_an_epoch_in_windows_of_its_shards(context, monkeypatch):
    monkeypatch.setattr("compress.distill.signals.SHARDS_IN_MEMORY", 4)
    monkeypatch.setattr("compress.distill.signals.WINDOW_SHARDS", 2)
    signals, data, size = signals_of(context), context.text(), 16 * 5 + 3
    assert signals.windows(64) is None and signals.windows(size) == (16, 2)
    batches = make_batches(data, signals, seed=7, sequences=size, batch=1)
    signals.make(size)
    read, fetched = [], []
    monkeypatch.setattr(signals.fs, "cat_file", counted(signals.fs.cat_file, fetched))
    monkeypatch.setattr(signals, "read", counted(signals.read, read))
    for step in range(2 * size):
        batches(step, 1)
    rows = [row for (row,) in read]

    # Every row once an epoch, another order in each, and never rows of more than two shards.
    epochs = [rows[:size], rows[size:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size)) and epochs[0] != epochs[1]
    for epoch in epochs:
        for shard in range(6):
            places = [place for place, row in enumerate(epoch) if row // 16 == shard]
            assert places[-1] - places[0] < 2 * 16
    assert len(fetched) <= 2 * 6 + 1


def signals_of(context, scheme="sampled") -> Signals:
    return Signals(
        context.signals,
        context.teacher,
        context.text(),
        Scheme(scheme),
        seed=0,
        precision="fp32",
        log=lambda line: None,
    )


def counted(function, calls):
    """`function`, its first argument noted."""

    def counting(first, *others, **named):
        calls.append(first)
        return function(first, *others, **named)

    return counting


def test_the_head_of_kept_states_is_read_without_the_rest_of_the_teacher(context, monkeypatch):
    from compress.distill import signals as module

    make = signals_of(context, "hidden")
    make.make(16)
    expected = make.teacher_head.weight_VH
    monkeypatch.setattr(module, "load_model", None)
    head = signals_of(context, "hidden").teacher_head
    assert torch.equal(head.weight_VH, expected) and head.bias_V is None
