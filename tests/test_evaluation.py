"""Fidelity figures against torch's own loss functions and closed forms; windows, texts and hidden facts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from kvbits.errors import ConfigError
from kvbits.evaluation.documents import FACTS, hide_facts, messages, reference_text
from kvbits.evaluation.fidelity import Fidelity
from kvbits.evaluation.windows import cut_windows, read_text


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    reference = 4 * torch.randn(300, 97, generator=generator)
    other = reference + 0.3 * torch.randn(300, 97, generator=generator)
    return reference, other, torch.randint(97, (300,), generator=generator)


def test_fidelity_equals_torch_losses(rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, other, targets = rows
    fidelity = Fidelity()
    for part in (slice(0, 7), slice(7, 300)):  # streaming must not change anything, nor may the row blocks
        fidelity.add(reference[part], other[part], targets[part])
    found = fidelity.summary()
    kl = torch.nn.functional.kl_div(
        torch.log_softmax(other.double(), -1),
        torch.log_softmax(reference.double(), -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert found.tokens == 300
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-12)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-12)
    assert found.kl_p99 == pytest.approx(torch.quantile(kl, 0.99).item(), rel=1e-12)
    for logits, perplexity in ((other, found.perplexity), (reference, found.perplexity_16bit)):
        expected = torch.nn.functional.cross_entropy(logits.double(), targets).exp().item()
        assert perplexity == pytest.approx(expected, rel=1e-12)
    assert found.top1_agreement == (reference.argmax(-1) == other.argmax(-1)).double().mean().item()


def test_fidelity_of_two_outcomes_is_the_textbook_formula() -> None:
    p, q = 0.9, 0.6
    fidelity = Fidelity()
    fidelity.add(torch.tensor([[p, 1 - p]]).log(), torch.tensor([[q, 1 - q]]).log(), torch.tensor([1]))
    found = fidelity.summary()
    assert found.kl_mean == pytest.approx(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), rel=1e-6)
    assert found.perplexity == pytest.approx(1 / (1 - q), rel=1e-6)
    assert found.perplexity_16bit == pytest.approx(1 / (1 - p), rel=1e-6)


def test_fidelity_resolves_differences_that_float32_would_lose() -> None:
    """A shift of one logit by d costs d^2 p (1 - p) / 2 nats to second order."""
    reference = torch.zeros(1, 1000)
    other = reference.clone()
    other[0, 0] = 1e-3
    fidelity = Fidelity()
    fidelity.add(reference, other, torch.tensor([0]))
    assert fidelity.summary().kl_mean == pytest.approx(1e-6 * 1e-3 * (1 - 1e-3) / 2, rel=1e-3)


def test_identical_logits_are_exactly_zero_and_a_swap_is_seen(rows: tuple[torch.Tensor, ...]) -> None:
    reference, _, targets = rows
    same = Fidelity()
    same.add(reference, reference.clone(), targets)
    assert same.summary().kl_max == 0.0
    assert same.summary().top1_agreement == 1.0
    swapped = Fidelity()
    swapped.add(reference, reference.roll(1, dims=-1), targets)
    assert swapped.summary().top1_agreement == 0.0
    assert swapped.summary().kl_mean > 1


def test_positions_are_kept_for_results_by_context(rows: tuple[torch.Tensor, ...]) -> None:
    reference, other, targets = rows
    fidelity = Fidelity()
    fidelity.add(reference, other, targets, first_position=1024)
    assert np.concatenate(fidelity.positions).tolist() == list(range(1024, 1324))


def test_windows_follow_each_other() -> None:
    assert cut_windows(range(25), 10, 2) == [list(range(10)), list(range(10, 20))]


@pytest.mark.parametrize(
    ("tokens", "context", "count", "words"),
    [
        (25, 10, 3, "25 tokens; 3 windows of 10 need 30 (it holds 2)"),
        (25, 3, 1, "at least 4"),
        (25, 10, 0, "at least 1"),
    ],
)
def test_windows_that_do_not_fit_say_so(tokens: int, context: int, count: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut_windows(range(tokens), context, count)
    assert words in str(caught.value)


def test_text_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"caf\xe9 au lait")
    for path, reason in ((tmp_path / "none.txt", "No such file"), (tmp_path, "Is a directory"), (empty, "is empty")):
        with pytest.raises(ConfigError, match=reason):
            read_text(path)
    with pytest.raises(ConfigError, match="not UTF-8: byte 0xe9 at offset 3"):
        read_text(binary)


def test_text_keeps_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "crlf.txt"
    path.write_bytes("für\r\nalle\n".encode())
    assert read_text(path) == "für\r\nalle\n"


def test_documents_are_long_different_and_hide_one_fact_each() -> None:
    documents = hide_facts(8, 1500, words)
    for document, (place, code) in zip(documents, FACTS, strict=False):
        assert words(document.text) >= 1500
        assert document.text.count(code) == 1
        assert place in document.question
        assert code not in document.question
        assert document.answer == code
    for a, b in itertools.combinations(documents, 2):
        shared = set(a.text.split("\n\n")) & set(b.text.split("\n\n"))
        assert sum(map(words, shared)) < 150, shared
        assert a.answer not in b.text
    depths = [d.text.index(d.answer) / len(d.text) for d in documents]
    assert min(depths) < 0.25
    assert max(depths) > 0.75


def test_the_hidden_numbers_are_not_in_the_text_itself() -> None:
    text = reference_text()
    assert len(text) > 200_000
    assert not [code for _, code in FACTS if code in text]


def test_an_answer_must_be_the_number_itself() -> None:
    document = hide_facts(1, 100, words)[0]
    assert document.found_in(f"The code is {document.answer}.")
    assert not document.found_in(f"The code is {document.answer}7.")
    assert not document.found_in(f"The code is {document.answer[:-1]}.")
    assert document.answer in messages(document)[0]["content"]


def test_more_documents_than_the_text_has_is_an_error() -> None:
    with pytest.raises(ConfigError, match="too short"):
        hide_facts(4, 10_000_000, words)
    with pytest.raises(ConfigError, match="choose 1 to"):
        hide_facts(100, 10, words)
    with pytest.raises(ConfigError, match="too short"):
        hide_facts(1, 50, words, text="one short paragraph")
