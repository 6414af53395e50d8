"""What a prefix cache could find: the hits that a trace's hashes allow, for a cache of any size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvbits.replay.trace import TraceRequest
from kvbits.traces import BLOCK_TOKENS

Page = tuple[int, int]


def allowed_hits(requests: Sequence[TraceRequest], page_tokens: int, pages: int | None = None) -> list[int]:
    """Prompt tokens of each request that a least-recently-used cache of ``pages`` pages would hold.

    Requests run one after another; each leaves the pages of its prompt and of its answer, the deepest of a sequence
    evicted first. ``pages`` ``None``: an endless cache. A request never finds its whole prompt, since its last token
    must be computed. Raises ``ValueError`` when ``page_tokens`` does not divide a block.
    """
    if BLOCK_TOKENS % page_tokens:
        raise ValueError(f"pages of {page_tokens} tokens do not divide blocks of {BLOCK_TOKENS}")
    cache: OrderedDict[Page, None] = OrderedDict()
    chains: dict[tuple[int, int], int] = {}
    found = []
    for number, request in enumerate(requests):
        prompt = list(_prompt_pages(request, page_tokens, chains))
        most = (request.prompt_tokens - 1) // page_tokens
        hits = 0
        while hits < min(most, len(prompt)) and prompt[hits] in cache:
            hits += 1
        found.append(hits * page_tokens)
        whole = (request.prompt_tokens + max(0, request.output_tokens - 1)) // page_tokens
        answer = [(-1 - number, page) for page in range(len(prompt), whole)]
        for page in reversed(prompt + answer):
            cache[page] = None
            cache.move_to_end(page)
        while pages is not None and len(cache) > pages:
            cache.popitem(last=False)
    return found


def _prompt_pages(request: TraceRequest, page_tokens: int, chains: dict[tuple[int, int], int]) -> Iterator[Page]:
    """Names of the whole pages of a prompt: equal exactly when all blocks up to theirs are equal."""
    chain = 0
    each = BLOCK_TOKENS // page_tokens
    whole = request.prompt_tokens // page_tokens
    for index, block in enumerate(request.blocks):
        chain = chains.setdefault((chain, block), len(chains) + 1)
        for page in range(index * each, min((index + 1) * each, whole)):
            yield chain, page
