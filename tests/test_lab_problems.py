"""School arithmetic and the paired test."""

from __future__ import annotations

import json
from decimal import Decimal
from itertools import product
from pathlib import Path

import pytest
from helpers.tiny import chat_tokenizer, save, tiny_model

from kvbits.errors import ConfigError
from kvbits.evaluation.arithmetic import Problem, Solved, read_number, read_problems, solve
from kvbits.evaluation.findings import of_problems
from kvbits.evaluation.paired import mcnemar
from kvbits.evaluation.resume import ResumeCache
from kvbits.models import LoadedModel, load_model


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 * 3 = 15\n#### 15", "15"),
        ("#### 1,234", "1234"),
        ("#### $1,000.50 in all, not 7", "1000.5"),
        ("#### 3 \nand #### -4", "-4"),
        ("first 12, then 70000.", "70000"),
        ("18.00", "18"),
        ("#### 1,234.", "1234"),
        ("It costs $5.00.", "5"),
        ("It is -$7", "-7"),
        ("between 10-12", "12"),
        ("#### -3", "-3"),
        ("#### .5", "0.5"),
        ("#### 1/2", "0.5"),
        ("#### **18** apples, 3 each", "18"),
        ("####\n18", "18"),
        ("#### Answer: 3 + 15 = 18", "18"),
        ("#### 2. Add the 3 and the 15\nThey are 18", "18"),
        ("#### Step 2: add\nIt is 18", "18"),
        ("She can go \\(\\boxed{3}\\) times with her $42.", "3"),
        ("\\[ \\boxed{\\$1,050 \\text{ dollars}} \\] in 30 years", "1050"),
        ("#### 17\nNo: \\boxed{x = 18}", "18"),
        ("9" * 5000, "9" * 5000),
        ("4 came before\n#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert read_number(text) == (None if number is None else Decimal(number))


def test_an_answer_is_right_by_its_value() -> None:
    problem = Problem((1,), Decimal("18"))
    assert Solved(problem, "#### 18.0").right
    assert not Solved(problem, "#### 180").right
    assert not Solved(problem, "I do not know").right


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (1, 9), (9, 1), (4, 4), (7, 3)])
def test_mcnemar_by_counting_all_splits(lost: int, won: int) -> None:
    """Every way in which the changed answers may fall, each as likely: the share at least as uneven as this one."""
    splits = [sum(bits) for bits in product((0, 1), repeat=lost + won)]
    uneven = sum(abs(2 * s - lost - won) >= abs(won - lost) for s in splits) / len(splits)
    own = [False] * lost + [True] * won + [True, True, False]
    reference = [True] * lost + [False] * won + [True, True, False]
    found = mcnemar(own, reference)
    assert (found["lost"], found["won"], found["right"], found["right_16bit"]) == (lost, won, won + 2, lost + 2)
    assert found["p"] == pytest.approx(uneven)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    tiny = tiny_model("llama", max_position_embeddings=1024)
    return load_model(save(tiny, tmp_path_factory.mktemp("model"), chat_tokenizer), dtype="float32")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k_test.jsonl"
    lines = [{"question": f"w5 w{i}", "answer": f"w7 <<2*{i}>>\n#### {i},000"} for i in range(8, 12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_problems_are_asked_in_a_chat_and_answered_once(loaded: LoadedModel, file: Path, tmp_path: Path) -> None:
    problems = read_problems(loaded, file, 3, 1024)
    assert [p.truth for p in problems] == [8000, 9000, 10000]
    kept = ResumeCache(tmp_path / "parts.jsonl")
    policy = loaded.policy("int4")
    seen: list[int] = []
    solved = solve(loaded, policy, problems, kept, progress=seen.append)
    assert sum(seen) == sum(len(p.prompt) for p in problems)
    again = solve(loaded, policy, problems, ResumeCache(tmp_path / "parts.jsonl"))
    assert [s.text for s in again] == [s.text for s in solved]
    figures, (measure,) = of_problems(solved, again)
    assert (figures["questions"], figures["same_text"], figures["lost"], figures["p"]) == (3, 3, 0, 1.0)
    assert measure.loss.mean == 0


def test_files_and_contexts_that_do_not_serve(loaded: LoadedModel, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"no problem of .* fits a context of 6 tokens with 3"):
        read_problems(loaded, file, 3, 6)
    file.write_text('{"question": "w5", "answer": "many"}')
    with pytest.raises(ConfigError, match="has no number: 'many'"):
        read_problems(loaded, file, 3, 1024)
