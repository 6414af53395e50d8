"""Long-context tasks: what is asked has one answer in the prompt, at the depth and length that the labels say."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvbits.errors import ConfigError
from kvbits.evaluation.documents import reference_text
from kvbits.evaluation.parts import NAMES
from kvbits.evaluation.selection import choose
from kvbits.evaluation.tasks import TASKS, Material
from kvbits.evaluation.tasks.babi import read_stories
from kvbits.evaluation.tasks.base import paragraphs, spread

LENGTHS = (400, 800)
STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
1 John travelled to the office.
2 Where is John?|office|1
"""


class Words:
    """A tokenizer of words and signs that can be read back."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> Sequence[int]:
        return [self.ids.setdefault(word, len(self.ids)) for word in re.findall(r"\w+|[^\w\s]", text)]

    def decode(self, tokens: Sequence[int]) -> str:
        names = list(self.ids)
        return " ".join(names[t] for t in tokens)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for kind in ("qa1", "qa2"):
        path = tmp_path / f"{kind}_facts_test.txt"
        path.write_text(STORY)
        found[f"{kind}_*_test.txt"] = path
    return found


@pytest.fixture
def words() -> Words:
    return Words()


def material(words: Words, files: dict[str, Path], **changes: object) -> Material:
    options = {"lengths": LENGTHS, "depths": 3, "samples": 2, "files": files, **changes}
    return Material(words.encode, words.encode, reference_text(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_stands_in_the_prompt_and_the_length_is_kept(
    name: str, words: Words, files: dict[str, Path]
) -> None:
    probes = TASKS[name].make(material(words, files))
    assert len(probes) >= 2
    for probe in probes:
        length = probe.labels["length"]
        assert length in LENGTHS
        # nearly full: the last part that did not fit is missing (a paragraph of the reference may be long)
        least = 0.5 if name in ("needle", "babi") else 0.8
        assert least * length <= len(probe.prompt) + len(probe.gold) <= length
        text, gold = words.decode(probe.prompt), words.decode(probe.gold)
        for part in re.findall(r"\w+", gold):
            assert part in text.split()
    assert {p.labels["length"] for p in probes} == (set(LENGTHS) if TASKS[name].heat_map else {max(LENGTHS)})
    assert len({(p.document, p.prompt, p.gold) for p in probes}) == len(probes)
    again = TASKS[name].make(material(words, files))
    assert probes == again


@pytest.mark.parametrize("name", ["needle", "kv-retrieval", "lines", "multikey", "variables"])
def test_questions_of_a_document_share_all_but_their_end(name: str, words: Words, files: dict[str, Path]) -> None:
    probes = TASKS[name].make(material(words, files, samples=1, lengths=(800,)))
    first, last = probes[0].prompt, probes[-1].prompt
    shared = next(i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    assert shared > 0.85 * len(first)
    assert len({p.gold for p in probes}) == len(probes)


@pytest.mark.parametrize("name", ["passkey", "needle", "kv-retrieval", "lines", "multikey"])
def test_depth_is_where_the_answer_first_stands(name: str, words: Words, files: dict[str, Path]) -> None:
    for probe in TASKS[name].make(material(words, files, lengths=(800,), samples=1)):
        key = probe.gold[1] if words.decode(probe.gold[:1]) in ("<", '"') else probe.gold[0]
        place = probe.prompt.index(key) / len(probe.prompt)
        assert place == pytest.approx(probe.labels["depth"], abs=0.2)


def test_passkeys_hide_one_number_once_per_document(words: Words, files: dict[str, Path]) -> None:
    for probe in TASKS["passkey"].make(material(words, files)):
        assert probe.prompt.count(probe.gold[0]) == 2  # said twice in its own sentence


def test_variables_follow_from_the_assignments_in_the_text(words: Words, files: dict[str, Path]) -> None:
    for probe in TASKS["variables"].make(material(words, files)):
        text = words.decode(probe.prompt)
        value = re.search(r"hold the value (\d+)", text)
        assert value is not None
        holders: list[str] = []
        for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
            if number == value.group(1) or other in holders:
                holders.append(name)
        assert re.findall(r"[A-Z]{3}", words.decode(probe.gold).replace("VAR", "")) == holders
        assert len(holders) == 5


def test_common_words_are_the_most_frequent_of_their_list_in_its_order(words: Words, files: dict[str, Path]) -> None:
    for probe in TASKS["common-words"].make(material(words, files)):
        text = words.decode(probe.prompt)
        own = text[text.rindex(" 1 . ") :]  # after the example
        listed = re.findall(r"\d+ \. (\w+ - \w+)", own)
        counts = Counter(listed)
        often = [word for word, _ in counts.most_common(10)]
        assert min(counts[w] for w in often) > max(n for w, n in counts.items() if w not in often)
        assert re.findall(r"\w+ - \w+", words.decode(probe.gold)) == sorted(often, key=listed.index)


def test_published_files_are_used(words: Words, files: dict[str, Path], tmp_path: Path) -> None:
    records = [{"ordered_kv_records": [[f"k{r}x{i}", f"v{r}x{i}"] for i in range(40)]} for r in range(3)]
    packed = tmp_path / "kv-retrieval-40_keys.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    lines = tmp_path / "longchat_lines_9.jsonl"
    body = "\n".join(f"line big-dog{i}: REGISTER_CONTENT is <{100 + i}>" for i in range(90))
    lines.write_text(json.dumps({"prompt": f"Read this.\n{body}\nWhat is in line big-dog3?"}) + "\n")
    given = files | {"kv-retrieval-*.jsonl*": packed, "longchat_lines_*.jsonl*": lines}
    for probe in TASKS["kv-retrieval"].make(material(words, given, samples=1)):
        assert re.fullmatch(r'" v\dx\d+ "', words.decode(probe.gold))
    found = TASKS["lines"].make(material(words, given, samples=1))
    assert words.decode(found[0].gold) == "< 100 >"


def test_stories_end_with_their_last_question(tmp_path: Path) -> None:
    path = tmp_path / "qa.txt"
    path.write_text(STORY)
    first, second = read_stories(path)
    assert (first.question, first.answer, len(first.facts)) == ("Where is Daniel?", "hallway", 4)
    assert (second.question, second.answer, second.facts) == (
        "Where is John?", "office", ("John travelled to the office.",),
    )  # fmt: skip
    path.write_text("no numbers here\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_stories(path)


def test_facts_of_one_place_keep_their_order() -> None:
    assert spread(["a", "b"], ["1", "2", "3"], [0.5, 0.5, 1.0]) == ["a", "1", "2", "b", "3"]


def test_books_lose_their_licence() -> None:
    book = "Licence\r\n*** START OF THIS BOOK ***\r\n\r\nOne\r\ntwo.\r\n\r\nThree.\r\n*** END OF THIS BOOK ***\r\nMore"
    assert paragraphs(book) == ["One two.", "Three."]


def test_texts_and_contexts_that_are_too_short_say_so(words: Words, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="too short for the task 'needle'"):
        TASKS["needle"].make(Material(words.encode, words.encode, "Just a line.", (500,)))
    with pytest.raises(ConfigError, match="task 'kv-retrieval'"):
        TASKS["kv-retrieval"].make(material(words, files, lengths=(80,)))


def test_the_menu_knows_what_each_part_needs(tmp_path: Path) -> None:
    assert choose("needle, fidelity", True, None).parts == ("fidelity", "needle")
    with pytest.raises(ConfigError, match=r"unknown task 'nedle'; choose from fidelity, .*, or all"):
        choose("nedle", True, None)
    with pytest.raises(ConfigError, match="there is no task"):
        choose(" , ", True, None)
    with pytest.raises(ConfigError, match="'fidelity' needs a text; give --text"):
        choose("fidelity", False, None)
    with pytest.raises(ConfigError, match=r"'babi' needs a file named like 'qa1_\*_test.txt'"):
        choose("babi", False, tmp_path)
    with pytest.raises(ConfigError, match=r"'tools' needs a file .* without --data-dir"):
        choose("tools", False, None)
    with pytest.raises(ConfigError, match="does not exist"):
        choose("lines", False, tmp_path / "none")
    inner = tmp_path / "some" / "where"
    inner.mkdir(parents=True)
    for kind in ("qa1", "qa2"):
        (inner / f"{kind}_x_test.txt").write_text(STORY)
    (inner / "BFCL_v4_simple_python.json").write_text("{}")
    (inner / "gsm8k_test.jsonl").write_text("{}")
    selection = choose("all", True, tmp_path)
    assert selection.parts == NAMES
    assert selection.files["qa1_*_test.txt"] == inner / "qa1_x_test.txt"
