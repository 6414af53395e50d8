"""A KV cache dtype that is chosen by measuring: the measure, the rule, and what is kept for next time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.serving import byte_model, byte_tokenizer, packed_byte_model
from helpers.tiny import tiny_model

from kvbits import LLM, SamplingParams, user_cache
from kvbits.auto import choose as choosing
from kvbits.auto import store
from kvbits.auto.choose import CONTEXT, WINDOWS, Choice, choose, fewest_bits
from kvbits.auto.ladder import LADDER, almost_nothing, identity, rungs
from kvbits.auto.loss import Loss, known_line
from kvbits.auto.measure import divergence, first_scored, measure, passes
from kvbits.auto.wanted import BOUND, MOST, Wanted
from kvbits.codecs import PoolLayout, parse_policy
from kvbits.engine.bar import no_bar
from kvbits.errors import ConfigError, KVBitsError, UnsupportedError
from kvbits.evaluation.compare import SideBySide
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.selftext import write_windows
from kvbits.evaluation.verdict import LIMITS
from kvbits.kernels import default_backend
from kvbits.models import LoadedModel
from kvbits.models.load import wrap


@pytest.fixture(scope="module")
def byte_loaded() -> Iterator[LoadedModel]:
    """The tiny model with heads that every dtype of the ladder takes, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield byte_model(head_dim=32)
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvbits" / "losses"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four pages."""
    monkeypatch.setattr(choosing, "CONTEXT", 256)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the ladder is measured."""
    found: list[int] = []

    def count(*arguments: object) -> list[Loss]:
        found.append(1)
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(choosing, "measure", count)
    return found


def chosen(loaded: LoadedModel, notes: list[str] | None = None, **wanted: object) -> Choice:
    told = [] if notes is None else notes
    return choose(loaded, Wanted("auto", **wanted), no_bar, told.append)  # type: ignore[arg-type]


def lossy(dtype: str, high: float) -> Loss:
    return Loss(dtype, high / 2, high / 4, high, 100, 256, "", "float32")


def test_the_bound_is_what_the_verdict_calls_no_loss() -> None:
    assert (LIMITS["kl"].none, LIMITS["kl"].bad) == (BOUND, MOST)


@pytest.mark.parametrize("spread", [0.001, 0.1, 3.0])
def test_the_divergence_is_that_of_the_laboratory(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = 4 * torch.randn(70, 3001, generator=generator)
    own = reference + spread * torch.randn(70, 3001, generator=generator)
    record = Fidelity()
    record.add(reference, own, torch.zeros(70, dtype=torch.long))
    expected = np.concatenate(record.kl)
    assert np.abs(divergence(reference, own) - expected).max() < 3e-6 + 1e-5 * expected.max()
    assert divergence(reference, reference).max() == 0


def test_the_ladder_measured_is_the_laboratorys_side_by_side(byte_loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(2)
    windows = torch.randint(3, 259, (2, 257), generator=generator).tolist()
    ladder = [byte_loaded.policy(dtype) for dtype in ("int3", "int8")]
    own = measure(byte_loaded, ladder, [w[:256] for w in windows], "noise", math.inf, default_backend)
    side_by_side = SideBySide(byte_loaded, ladder, 257)
    first = first_scored(256)
    # The last row of the longer window has no target and is not scored there; it is the only one that is not here.
    runs = [side_by_side.run(window, first) for window in windows]
    for rung, loss in zip(ladder, own, strict=True):
        expected = np.concatenate([part for run in runs for part in run[rung.label].kl])
        assert loss.tokens == len(expected) == 2 * (256 - first)
        assert loss.kl == pytest.approx(expected.mean(), rel=1e-4, abs=1e-6)
        assert loss.low < loss.kl < loss.high
    assert own[0].kl > 20 * own[1].kl


def test_what_the_arithmetic_rounds_by_itself_is_taken_off() -> None:
    loaded = packed_byte_model(head_dim=32)
    window = torch.randint(3, 259, (257,), generator=torch.Generator().manual_seed(3)).tolist()
    first = first_scored(256)
    side_by_side = SideBySide(loaded, [loaded.policy("int4"), loaded.policy("0:int8,1-2:bf16")], 257)
    four, almost = (np.concatenate(record.kl) for record in side_by_side.run(window, first).values())
    assert almost.mean() > 0
    (loss,) = measure(loaded, [loaded.policy("int4")], [window[:256]], "noise", 1.0, default_backend)
    assert loss.kl == pytest.approx((four - almost).mean(), rel=1e-3)
    assert almost_nothing(byte_model()) is None  # float32 has nothing of the kind
    assert almost_nothing(packed_byte_model(num_hidden_layers=1)) is None


def test_only_what_may_be_under_the_bound_reads_more_than_one_window(byte_loaded: LoadedModel) -> None:
    windows = write_windows(byte_loaded, 256, 3, texts=2)
    ladder = rungs(byte_loaded, default_backend())
    computed: list[int] = []
    one = measure(byte_loaded, ladder, windows[:1], "", 1.0, default_backend)
    bound = sorted(loss.low for loss in one)[1]  # two dtypes reach down to it
    three = measure(byte_loaded, ladder, windows, "", bound, default_backend, computed.append)
    scored = 256 - first_scored(256)
    more = {loss.dtype for loss in three if loss.tokens == 3 * scored}
    assert more == {loss.dtype for loss in one if loss.low <= bound}
    assert {loss.tokens for loss in three if loss.dtype not in more} == {scored}
    assert [a for a in three if a.dtype not in more] == [a for a in one if a.dtype not in more]
    assert sum(computed) == 256 * passes(byte_loaded, 3, len(ladder))


def test_the_ladder_goes_by_effective_bits(byte_loaded: LoadedModel) -> None:
    ladder = rungs(byte_loaded, default_backend())
    assert {rung.label for rung in ladder} == set(LADDER)
    bits = [PoolLayout.of(byte_loaded.geometry, rung).effective_bits(1024) for rung in ladder]
    assert bits == sorted(bits)


def test_the_rule_is_the_fewest_bits_whose_whole_interval_is_under_the_bound() -> None:
    ladder = [parse_policy(dtype, 2) for dtype in ("int3", "int4", "int6", "int8")]
    losses = [lossy(identity(rung), high) for rung, high in zip(ladder, (0.05, 0.002, 0.0009, 0.0001), strict=True)]
    for bound, dtype in ((0.05, "int3"), (0.049, "int4"), (0.0015, "int6"), (0.0005, "int8")):
        found = fewest_bits(ladder, losses, bound)
        assert found is not None
        assert found.name == dtype
    assert fewest_bits(ladder, losses, 0.00005) is None
    # a dtype of fewer bits may lose less: no order is taken for granted
    losses[1] = lossy(identity(ladder[1]), 0.00001)
    found = fewest_bits(ladder, losses, 0.00005)
    assert found is ladder[1]


def test_only_what_has_fewer_bits_is_said_to_be_over_the_bound(
    byte_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = rungs(byte_loaded, default_backend())
    taken = next(rung for rung in ladder if rung.label == "int5")
    before = ladder[: ladder.index(taken)]
    # in a short context its first page makes int4+sink:int8 the larger one
    assert before
    assert any(rung.label == "int4+sink:int8" for rung in ladder[len(before) :])
    losses = [lossy(identity(rung), 0.02 if rung in before else 0.0001) for rung in ladder]
    monkeypatch.setattr(choosing, "measure", lambda *_: losses)
    listed = ", ".join(f"{rung.label} 0.0100" for rung in before)
    assert chosen(byte_loaded).line.endswith(f"the bound is 0.001; fewer bits were over it: {listed}")


def test_the_next_start_reads_what_was_measured(byte_loaded: LoadedModel, counted: list[int], cache: Path) -> None:
    first = chosen(byte_loaded)
    assert (first.measured, len(counted)) == (True, 1)
    assert first.loss is not None
    assert first.loss.high <= BOUND or first.policy.name == "bf16"
    again = chosen(byte_loaded)
    assert dataclasses.replace(again, measured=True) == first
    # another bound is another choice from the same figures
    strict, loose = chosen(byte_loaded, max_kl=1e-9), chosen(byte_loaded, max_kl=MOST)
    assert strict.policy.name == "bf16"
    assert "no dtype of fewer bits stays under the bound" in strict.line
    (losses,) = [store._read(file) for file in cache.rglob("*.json")]
    under = {loss.dtype for loss in losses if loss.high <= MOST}
    ladder = rungs(byte_loaded, default_backend())
    assert loose.policy == next(rung for rung in ladder if identity(rung) in under)
    assert len(counted) == 1
    # all else is measured anew
    chosen(dataclasses.replace(byte_loaded, weights="int8"))
    chosen(dataclasses.replace(byte_loaded, fingerprint="another"))
    assert len(counted) == 3


def test_a_text_of_the_user(byte_loaded: LoadedModel, counted: list[int], tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael. " * 100)
    found = chosen(byte_loaded, text=path, max_kl=MOST)
    assert found.loss is not None
    assert found.loss.text == "book.txt"
    assert "tokens of book.txt" in found.line
    assert chosen(byte_loaded, text=path, max_kl=MOST).line == found.line
    assert len(counted) == 1
    path.write_text("Some years ago, never mind how long " * 100)
    chosen(byte_loaded, text=path)
    chosen(byte_loaded)
    assert len(counted) == 3
    path.write_text("too short")
    with pytest.raises(ConfigError, match=f"has 9 tokens; {WINDOWS * 256} are needed"):
        chosen(byte_loaded, text=path)


@pytest.mark.parametrize(
    "spoil",
    ["{", "[]", "[" * 5000, {"version": 0}, {"kvbits": "0.0.1"}, {"losses": [{}]}, {"losses": []}, {"losses": 3}],
)
def test_a_file_that_is_damaged_or_old_is_said_and_measured_again(
    byte_loaded: LoadedModel, counted: list[int], cache: Path, spoil: str | dict[str, object]
) -> None:
    line = chosen(byte_loaded).line
    (file,) = cache.rglob("*.json")
    whole = file.read_text()
    file.write_text(spoil if isinstance(spoil, str) else json.dumps({**json.loads(whole), **spoil}))
    notes: list[str] = []
    assert store.find(byte_loaded.fingerprint, identity(byte_loaded.policy("int8"))) is None
    assert chosen(byte_loaded, notes).line == line
    assert len(notes) == 1
    assert str(file) in notes[0]
    assert notes[0].endswith("it is measured again")
    assert len(counted) == 2
    assert json.loads(file.read_text()) == json.loads(whole)


def test_without_a_place_to_write_it_measures_again_and_says_so(
    byte_loaded: LoadedModel, counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes: list[str] = []
    assert chosen(byte_loaded, notes).line == chosen(byte_loaded, notes).line
    assert len(counted) == 2
    assert len(notes) >= 2
    assert all("the next start measures again" in note for note in notes[-1:])


def test_an_interrupted_measurement_leaves_nothing(byte_loaded: LoadedModel, cache: Path) -> None:
    @contextmanager
    def interrupted(total: int, label: str) -> Iterator[Callable[[int], None]]:
        def advance(tokens: int) -> None:
            if label.startswith("measuring"):
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        choose(byte_loaded, Wanted("auto"), interrupted)
    assert not list(cache.rglob("*"))


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "file.json"
    user_cache.write(file, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        user_cache.write(file, "new")
    assert [path.read_text() for path in file.parent.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"max_kl": 0.0}, "--max-kl is 0; it must be over 0 and at most 0.05"),
        ({"max_kl": -1.0}, "--max-kl is -1"),
        ({"max_kl": 0.051}, "--max-kl is 0.051"),
        ({"max_kl": math.nan}, "--max-kl is nan"),
        ({"text": "/no/such/file"}, "cannot read the text file '/no/such/file'"),
        ({"dtype": "int4", "max_kl": 0.01}, "--max-kl is for --kv-cache-dtype auto, which chooses; 'int4' was named"),
        ({"dtype": "int4", "text": "x"}, "--text is for --kv-cache-dtype auto"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(wanted: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Wanted(**{"dtype": "auto", **wanted})  # type: ignore[arg-type]
    assert words in str(caught.value)
    options = {("kv_cache_dtype" if k == "dtype" else k): v for k, v in wanted.items()}
    with pytest.raises(ConfigError) as caught:
        LLM("no-such-model", **options)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", ["auto,int4", "int4+sink:auto", "0-1:auto,2:int4"])
def test_auto_stands_alone(byte_loaded: LoadedModel, dtype: str) -> None:
    with pytest.raises(ConfigError, match=r"the KV cache dtype 'auto' .*stands alone"):
        choose(byte_loaded, Wanted(dtype), no_bar)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1}, {"max_position_embeddings": 40}, {"max_position_embeddings": 130}]
)
def test_small_models(changes: dict[str, int], counted: list[int]) -> None:
    model = tiny_model("llama", **{"head_dim": 32, "vocab_size": 259, "max_position_embeddings": 512, **changes})
    loaded = wrap(model, byte_tokenizer(), "small")
    found = chosen(loaded)
    assert found.loss is not None
    if loaded.geometry.max_position == 40:
        # no page is ever sealed, so nothing is lost and the fewest bits do
        assert (found.policy, found.loss.kl) == (rungs(loaded, default_backend())[0], 0.0)


def test_no_order_of_the_model_is_followed_by_a_dtype_that_breaks_it(
    byte_loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are not finite with one dtype: it loses everything, the others are measured."""
    from kvbits.engine.model_runner import ModelRunner

    plain = ModelRunner.run

    def run(self: ModelRunner, batch: object) -> torch.Tensor:
        logits = plain(self, batch)  # type: ignore[arg-type]
        return logits * math.nan if self.policy.name.startswith("int4") else logits

    monkeypatch.setattr(ModelRunner, "run", run)
    chosen(byte_loaded)
    again = chosen(byte_loaded, max_kl=MOST)  # as it was written and read
    assert not again.measured
    assert not again.policy.name.startswith("int4")
    assert store.find(byte_loaded.fingerprint, identity(byte_loaded.policy("int4"))).kl == math.inf  # type: ignore[union-attr]


def test_a_model_whose_logits_are_not_finite(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    broken = byte_model()
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(math.nan)
    path = tmp_path / "text"
    path.write_text("word " * 200)
    for wanted in ({}, {"text": path}):
        with pytest.raises(UnsupportedError, match=r"cannot write a text|not finite even with a 16-bit cache"):
            chosen(broken, **wanted)
    assert not list(cache.rglob("*"))


def test_an_llm_takes_what_was_chosen(byte_loaded: LoadedModel, counted: list[int]) -> None:
    llm = LLM(byte_loaded, kv_cache_memory="4MiB", progress=False)
    assert llm.engine.pool.policy == llm.choice.policy == chosen(byte_loaded).policy
    params = SamplingParams(max_tokens=8, temperature=0)
    same = LLM(byte_loaded, kv_cache_dtype=llm.choice.policy.label, kv_cache_memory="4MiB", progress=False)
    assert llm.generate("abc", params)[0].outputs[0].text == same.generate("abc", params)[0].outputs[0].text
    assert same.choice.loss == llm.choice.loss
    assert len(counted) == 1
    # what no dtype can mend is told before anything is measured
    for options in ({"kv_cache_memory": "1KiB"}, {"max_model_len": 5000}):
        with pytest.raises(KVBitsError):
            LLM(dataclasses.replace(byte_loaded, fingerprint="third"), progress=False, **options)  # type: ignore[arg-type]
    assert len(counted) == 1


def test_what_is_said_of_a_dtype_that_is_named(byte_loaded: LoadedModel) -> None:
    def line(dtype: str) -> str:
        return choose(byte_loaded, Wanted(dtype), no_bar).line

    assert "int4 was never measured on this model" in line("int4")
    assert "--kv-cache-dtype auto" in line("int4")
    assert line("bf16") == "bf16 on this model: KL 0, nothing is lost"
    chosen(byte_loaded)
    loss = store.find(byte_loaded.fingerprint, identity(byte_loaded.policy("int4")))
    assert loss is not None
    words = f"measured on {loss.tokens:,} tokens that the model wrote"
    assert line("int4") == f"int4 on this model: KL {loss.kl:.4f}, {words}"
    assert line("0-2:int4").endswith(words)  # the same bytes in other words
    assert "never measured" in line("int4,int8")
    assert "KL 0.0110, measured on 2,048 tokens of a.txt" in known_line(
        "int4", Loss("x", 0.011, 0.01, 0.012, 2048, 2048, "a.txt", "float32")
    )


def test_windows_of_several_texts(byte_loaded: LoadedModel) -> None:
    windows = write_windows(byte_loaded, 70, 2, texts=3)
    assert [len(w) for w in windows] == [70, 70]
    # the token that begins a text stands where each of the three begins: 24 + 23 + 23
    assert [w[i] for w in windows for i in (0, 24, 47)] == [1] * 6
    assert windows == write_windows(byte_loaded, 70, 2, texts=3)
    starts = write_windows(byte_loaded, 70, 2, texts=3, starts=("one", "a start that is longer than a text"))
    assert [byte_loaded.tokenizer.decode(w[i + 1 : i + 4]) for w in starts for i in (0, 24, 47)] == ["one", "a s"] * 3
    assert byte_loaded.tokenizer.decode(starts[0][25:46]) == "a start that is longe"
    assert CONTEXT % 64 == 0
