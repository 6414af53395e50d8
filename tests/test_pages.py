"""The page manager under random operations, against a simulation of what every frame holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbits.errors import CacheError, OutOfPages
from kvbits.pages import PageManager, SequencePages
from kvbits.pages.groups import GONE

P = 4
"""Tokens in a page of the random test: small, so that boundaries are everywhere."""

Key = tuple[int, bytes, tuple[int, ...]]
"""What a cached page is known by: cache generation, salt, all tokens up to its end."""


PROMPTS = st.tuples(
    st.builds(
        lambda pages, rest: [token for page in pages for token in [page] * P] + [1] * rest,
        st.lists(st.integers(0, 1), max_size=4),
        st.integers(0, P),
    ),
    st.sampled_from([b"", b"", b"", b"", b"", b"x"]),
)
"""Tokens that often begin alike, and a salt."""


@dataclass
class Sim:
    """What the test knows of a sequence."""

    salt: bytes
    generation: int
    tokens: list[int]
    prompt: list[int]
    step: list[int] = field(default_factory=list)
    tentative: bool = False

    def row(self, index: int) -> tuple[bytes, tuple[int, ...]]:
        """What a kernel writes for token ``index``: it depends on everything before it."""
        return self.salt, tuple((self.tokens + self.step)[: index + 1])

    def key(self, pages: int) -> Key:
        return self.generation, self.salt, tuple(self.tokens[: pages * P])


class PageMachine(RuleBasedStateMachine):
    """Frames hold lists of rows; the kernels are simulated as the real ones work, in place."""

    @initialize(
        frames=st.integers(6, 14),
        open_frames=st.integers(1, 3),
        sealed_frames=st.sampled_from([1, 1, 2]),
        sink_frames=st.sampled_from([None, None, 1, 2, 3]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, frames: int, open_frames: int, sealed_frames: int, sink_frames: int | None, caching: bool) -> None:
        self.open_frames, self.sealed_frames, self.caching = open_frames, sealed_frames, caching
        self.first_frames = sink_frames or sealed_frames
        self.manager = PageManager(
            frames,
            open_frames,
            sealed_frames,
            page_tokens=P,
            enable_prefix_caching=caching,
            on_evict=self.evicted,
            sink_frames=sink_frames,
        )
        self.buffer: list[tuple[str, int, list] | None] = [None] * frames
        self.pending: list = []
        self.live: dict[int, Sim] = {}
        self.cached: dict[Key, tuple[int, ...]] = {}
        self.freed_at: dict[Key, int] = {}
        self.clock = self.next_id = self.generation = 0
        self.evicting: list[int] = []

    # The simulated pool

    def full(self, pages: SequencePages) -> int:
        """Full pages."""
        held = len(pages.sink) + len(pages.sealed)
        return 1 + (held - self.first_frames) // self.sealed_frames if held else 0

    def page(self, pages: SequencePages, number: int) -> tuple[int, ...]:
        """The frames of a full page."""
        held = [*pages.sink, *pages.sealed]
        if number == 0:
            return tuple(held[: self.first_frames])
        start = self.first_frames + (number - 1) * self.sealed_frames
        return tuple(held[start : start + self.sealed_frames])

    def named(self) -> set[int]:
        """Frames that live sequences name, by what the manager has told."""
        frames: set[int] = set()
        for seq_id, sim in self.live.items():
            pages = self.manager.slice(seq_id) if sim.step else self.manager.stored(seq_id)
            frames |= {*pages.sink, *pages.sealed, *pages.head, *pages.tail}
        return frames - {GONE}

    def idle(self) -> dict[Key, tuple[int, ...]]:
        named = self.named()
        return {key: frames for key, frames in self.cached.items() if not named & set(frames)}

    def evicted(self, digest: bytes, frame: int) -> None:
        assert len(digest) == 32
        self.evicting.append(frame)
        frames = tuple(self.evicting)
        idle = self.idle()
        (victim,) = [key for key, held in idle.items() if held[: len(frames)] == frames]
        if idle[victim] != frames:
            return
        self.evicting = []

        def leaf(key: Key) -> bool:
            return not any(k[:2] == key[:2] and len(k[2]) == len(key[2]) + P and k[2][:-P] == key[2] for k in idle)

        leaves = {key: (self.freed_at[key], -len(key[2])) for key in idle if leaf(key)}
        assert victim in leaves, "a page was evicted before the idle one that continues it"
        assert leaves[victim] == min(leaves.values()), (victim, leaves)
        del self.cached[victim]

    def apply(self, buffer: list) -> None:
        for source, target in self.pending:
            for a, b in zip(source, target, strict=True):
                buffer[b] = copy.deepcopy(buffer[a])

    def kernel(self, sim: Sim, pages: SequencePages) -> None:
        """Append the step's rows, sealing pages as they fill, in the frames named and from what they hold."""
        assert pages.start == len(sim.tokens)
        assert pages.count == len(sim.step)
        current = tuple(pages.head)
        for index in range(pages.start, pages.start + pages.count):
            if index % P == 0:
                for part, frame in enumerate(current):
                    self.buffer[frame] = ("open", part, [])
            for frame in current:
                held = self.buffer[frame]
                assert held is not None
                del held[2][index % P :]
                held[2].append(sim.row(index))
            if index % P == P - 1:
                number = index // P
                rows = list(self.buffer[current[0]][2])  # type: ignore[index]
                for part, frame in enumerate(self.page(pages, number)):
                    self.buffer[frame] = ("sealed", part, list(rows))
                current = tuple(pages.tail)

    def needed(self, seq_id: int, count: int, tentative: bool) -> int:
        """Frames of the sequence after the step, less those that it alone has now."""
        sim, pages = self.live[seq_id], self.manager.stored(seq_id)
        before = len(pages.sink) + len(pages.sealed)
        full = (len(sim.tokens) + count) // P
        after = self.first_frames + (full - 1) * self.sealed_frames if full else 0
        crossing = after > before
        others = {f for other in self.live if other != seq_id for f in self.manager.stored(other).head}
        own_open = bool(pages.head) and not others & set(pages.head)
        return after - before + self.open_frames * ((not own_open) + (tentative and crossing))

    def note(self, key: Key, frames: tuple[int, ...]) -> None:
        """A page was sealed in ``frames``."""
        self.cached.setdefault(key, frames)

    def gone(self, page: int, part: int, sealed: int) -> bool:
        """Whether a frame of a page was given back when ``sealed`` are full."""
        return False

    def expected_hit(self, tokens: list[int], salt: bytes) -> int:
        pages = 0
        while (pages + 1) * P < len(tokens) and (
            self.generation,
            salt,
            tuple(tokens[: (pages + 1) * P]),
        ) in self.cached:
            pages += 1
        return pages * P

    def ids(self, reserved: bool) -> list[int]:
        return [i for i, sim in self.live.items() if bool(sim.step) == reserved]

    # Rules

    @rule(prompt=PROMPTS)
    @precondition(lambda self: len(self.live) < 5)
    def open(self, prompt: tuple[list[int], bytes]) -> None:
        tokens, salt = prompt
        expected = self.expected_hit(tokens, salt)
        assert self.manager.lookup(tokens, salt) == expected
        got = self.manager.open(self.next_id, tokens, salt)
        assert got == expected
        self.live[self.next_id] = Sim(salt, self.generation, tokens[:got], tokens[got:])
        self.next_id += 1

    @rule(prompt=PROMPTS, data=st.data(), stay=st.booleans())
    @precondition(lambda self: len(self.live) < 5)
    def serve(self, prompt: tuple[list[int], bytes], data: st.DataObject, stay: bool) -> None:
        """A whole request at once: what random single operations reach too rarely."""
        self.open(prompt)
        seq_id = self.next_id - 1
        if self.live[seq_id].prompt:
            self.take(seq_id, len(self.live[seq_id].prompt), False, [])
            self.step(data)
        if not stay:
            self.drop(seq_id)

    @rule(data=st.data(), tentative=st.booleans(), count=st.integers(1, 10))
    @precondition(lambda self: self.ids(reserved=False))
    def decode(self, data: st.DataObject, tentative: bool, count: int) -> None:
        self.reserve(data, tentative, count)
        self.step(data)

    @rule(data=st.data(), tentative=st.booleans(), count=st.integers(1, 10))
    @precondition(lambda self: self.ids(reserved=False))
    def reserve(self, data: st.DataObject, tentative: bool, count: int) -> None:
        seq_id = data.draw(st.sampled_from(self.ids(reserved=False)))
        if tentative:
            count = min(count, 2 * P - 1 - len(self.live[seq_id].tokens) % P)
        self.take(seq_id, count, tentative, data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))

    def take(self, seq_id: int, count: int, tentative: bool, continuation: list[int]) -> None:
        sim = self.live[seq_id]
        step = (sim.prompt + continuation)[:count]
        needed = self.needed(seq_id, count, tentative)
        named = self.named()
        available = len(self.buffer) - len(named)
        assert self.manager.available() == available
        assert self.manager.frames_needed(seq_id, count, tentative) == needed
        before = self.manager.stats(), {i: self.manager.stored(i) for i in self.live}, dict(self.cached)
        if needed > available:
            with pytest.raises(OutOfPages, match=f"{needed} frames .* {available} of {len(self.buffer)}"):
                self.manager.reserve(seq_id, count, tentative)
            assert before == (self.manager.stats(), {i: self.manager.stored(i) for i in self.live}, self.cached)
            return
        self.moved: list[dict[int, int]] = []
        self.manager.reserve(seq_id, count, tentative)
        for moves in self.moved:
            named = {moves.get(frame, frame) for frame in named}
        sim.step, sim.tentative = step, tentative
        pages = self.manager.slice(seq_id)
        assert len(pages.head) == len(pages.tail) == self.open_frames
        written = {*pages.head, *pages.tail, *pages.sealed[len(before[1][seq_id].sealed) :]}
        assert not (written - set(before[1][seq_id].head)) & named, "a new frame belongs to somebody"
        crossing = (len(sim.tokens) + count) // P > len(sim.tokens) // P
        assert (pages.head != pages.tail) == (tentative and crossing)
        self.pending += self.manager.take_copies()

    @rule(data=st.data())
    @precondition(lambda self: self.ids(reserved=True))
    def run(self, data: st.DataObject) -> None:
        self.step(data)

    def step(self, data: st.DataObject) -> None:
        """One kernel call over every reserved sequence, then the commits."""
        self.apply(self.buffer)
        self.pending = []
        batch = [i for i, sim in self.live.items() if sim.step]
        for seq_id in batch:
            self.kernel(self.live[seq_id], self.manager.slice(seq_id))
        for seq_id in batch:
            sim = self.live[seq_id]
            count = data.draw(st.integers(0, len(sim.step))) if sim.tentative else len(sim.step)
            first = len(sim.tokens) // P
            pages = self.manager.slice(seq_id)
            self.manager.commit(seq_id, sim.step[:count])
            sim.tokens += sim.step[:count]
            sim.prompt = sim.prompt[count:]
            sim.step = []
            for page in range(first, len(sim.tokens) // P):
                if self.caching:
                    self.note(sim.key(page + 1), self.page(pages, page))

    @rule(data=st.data())
    @precondition(lambda self: self.ids(reserved=True))
    def rollback(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(self.ids(reserved=True)))
        sim = self.live[seq_id]
        if sim.tentative and data.draw(st.booleans()):
            self.apply(self.buffer)
            self.pending = []
            self.kernel(sim, self.manager.slice(seq_id))
        self.manager.rollback(seq_id)
        sim.step = []

    @rule(data=st.data())
    @precondition(lambda self: self.ids(reserved=False))
    def truncate(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(self.ids(reserved=False)))
        sim = self.live[seq_id]
        length = data.draw(st.integers(0, len(sim.tokens)))
        sealed = self.full(self.manager.stored(seq_id)) * P
        if length < sealed:
            with pytest.raises(CacheError, match=f"first {sealed} are in sealed"):
                self.manager.truncate(seq_id, length)
            return
        self.manager.truncate(seq_id, length)
        if length < len(sim.tokens):
            sim.prompt = []
        del sim.tokens[length:]

    @rule(data=st.data())
    @precondition(lambda self: len(self.live) < 5 and self.ids(reserved=False))
    def fork(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(self.ids(reserved=False)))
        free = self.manager.available()
        self.manager.fork(seq_id, self.next_id)
        assert self.manager.available() == free
        sim = self.live[seq_id]
        self.live[self.next_id] = Sim(sim.salt, sim.generation, list(sim.tokens), list(sim.prompt))
        self.next_id += 1

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def free(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(list(self.live)))
        self.drop(seq_id)

    def drop(self, seq_id: int) -> None:
        used = self.named()
        self.manager.free(seq_id)
        del self.live[seq_id]
        self.clock += 1
        left = used - self.named()
        for key, frames in self.cached.items():
            if left & set(frames):
                self.freed_at[key] = self.clock

    @rule()
    def clear_cache(self) -> None:
        self.manager.clear_cache()
        self.generation += 1
        self.cached.clear()

    # After every rule

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        stats = self.manager.stats()
        assert stats.cached == sum(len(frames) for frames in self.idle().values())
        assert stats.free + stats.open + stats.sealed + stats.cached == len(self.buffer)
        assert self.manager.sequences() == list(self.live)

    @invariant()
    def every_sequence_finds_its_tokens(self) -> None:
        if not hasattr(self, "manager"):
            return
        buffer = list(self.buffer)
        self.apply(buffer)
        for seq_id, sim in self.live.items():
            assert self.manager.tokens(seq_id) == sim.tokens
            assert self.manager.length(seq_id) == len(sim.tokens)
            pages = self.manager.slice(seq_id) if sim.step else self.manager.stored(seq_id)
            sealed = self.full(self.manager.stored(seq_id))
            rows = [sim.row(i) for i in range(len(sim.tokens))]
            for page in range(sealed):
                for part, frame in enumerate(self.page(pages, page)):
                    assert (frame == GONE) == self.gone(page, part, sealed), (seq_id, page, part)
                    assert frame == GONE or buffer[frame] == ("sealed", part, rows[page * P : (page + 1) * P]), (
                        seq_id,
                        page,
                    )
            count = len(sim.tokens) - sealed * P
            for part, frame in enumerate(pages.head if count else ()):
                held = buffer[frame]
                assert held is not None
                assert (held[0], held[1], held[2][:count]) == ("open", part, rows[sealed * P :]), (seq_id, "open")


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
