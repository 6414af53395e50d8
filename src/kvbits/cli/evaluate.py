"""``kvbits evaluate``: what a cache dtype costs in fidelity, long context and generated text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.extras import require
from kvbits.cli.output import JsonFile, writable
from kvbits.cli.session import Bar, load, machine, note, tokens_of
from kvbits.config import AUTO
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.models import LoadedModel

_PARTS = (
    "fidelity, layers, passkey, needle, kv-retrieval, lines, multikey, variables, common-words, babi, "
    "generation, tools, gsm8k, or all"
)


def evaluate(
    model: options.Model,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A UTF-8 text: fidelity from its start, and prompts for generation."),
    ] = None,
    kv_cache_dtype: options.KVCacheDtypes = None,
    kv_policy: options.KVPolicies = None,
    state_dtype: options.StateDtype = AUTO,
    tasks: Annotated[str, typer.Option(metavar="NAMES", help=f"With commas between: {_PARTS}.")] = "fidelity",
    window: Annotated[
        int, typer.Option("--window", "--context", min=4, metavar="TOKENS", help="Tokens of one window of the text.")
    ] = 2048,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows, one after another, not overlapping.")] = 8,
    all_positions: Annotated[
        bool, typer.Option(help="Results by position from the window's start on; the second half is what is compared.")
    ] = False,
    task_context: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Longest prompt of the tasks. Default: the context."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Documents of each task and length.")] = 1,
    depths: Annotated[int, typer.Option(min=1, metavar="N", help="Places in a document that are asked about.")] = 5,
    haystack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The book that facts are hidden in. Default: the text.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the tasks' data files lie, under their published names, at any depth."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts for generation.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate after each.")] = 256,
    tool_questions: Annotated[int, typer.Option(min=1, metavar="N", help="Questions that call for a tool.")] = 20,
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="Problems of school arithmetic (gsm8k).")] = 100,
    self_check: Annotated[
        bool, typer.Option(help="Run each dtype also with its scales off by 5 %, to see that the verdict notices.")
    ] = False,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    disable_mla: options.DisableMLA = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Arithmetic of the model's layers. The default float32 keeps bfloat16's rounding noise in the linear "
            "layers, which both caches share in kind but not in value, out of the comparison.",
        ),
    ] = "float32",
    task_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="The same for tasks, generation and tools, which run as served.")
    ] = "bfloat16",
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep finished parts here (JSON lines); never run them again.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report here: one page of HTML.")] = None,
    json_file: options.JsonFile = None,
) -> None:
    """Compare cache dtypes with the 16-bit cache through the real engine, pool and kernels, and give a verdict.

    Fidelity: the second half of each window of the text is scored: perplexity, KL divergence in nats, how often the
    likeliest token is the same; by position, and by layer. Long context: is the right answer found, and how likely is
    it. Generation: repetition, loops, and where greedy text leaves the 16-bit cache's. Tools: are calls the same. With
    --state-dtype every dtype keeps recurrent states so and is compared with 16 bit whose states are as the model
    computes them, in steps of one token; --kv-cache-dtype bf16 then shows what the states alone lose.
    """
    results = JsonFile(json_file)
    if html is not None:
        require("plot")
        writable(html)
    dtypes = options.cache_dtypes(kv_cache_dtype, kv_policy)
    from kvbits.engine.config import step_tokens
    from kvbits.engine.precheck import check_geometry, check_model, check_states
    from kvbits.evaluation.parts import FIDELITY, LAYERS, parts_of
    from kvbits.evaluation.windows import check_text, read_text
    from kvbits.models.formats import check_formats

    parts = parts_of(tasks, text is not None)
    check_formats(task_dtype)
    content = None if text is None else read_text(text)
    book = content if haystack is None else read_text(haystack)
    longest = None if text is None else window
    outline = check_model(model, dtypes, dtype=dtype, weights=weights, device=device, context=longest)
    check_states(outline, state_dtype)
    if state_dtype != AUTO and set(parts) == {LAYERS}:
        raise ConfigError(
            f"--state-dtype is {state_dtype}; the part '{LAYERS}' measures attention, which has no states"
        )
    if content is not None and {FIDELITY, LAYERS} & set(parts):
        check_text([content], window, windows)
    from kvbits.evaluation.compare import policies_of, with_states
    from kvbits.evaluation.laboratory import Laboratory
    from kvbits.evaluation.resume import ResumeCache
    from kvbits.evaluation.selection import Sizes, choose, document, run_tasks
    from kvbits.evaluation.selection import self_check as check

    selection = choose(tasks, text is not None, data_dir)
    sizes = Sizes(
        window, windows, task_context, depths, samples, texts, new_tokens, tool_questions, problems, all_positions
    )  # fmt: skip
    resume_cache = ResumeCache(resume)

    def loaded_in(name: str) -> LoadedModel:
        return load(
            model, name, threads, weights, device, trust_remote_code, max_model_len=longest, disable_mla=disable_mla,
            check=lambda geometry, _: check_geometry(geometry, dtypes, context=longest, state_dtype=state_dtype),
        )  # fmt: skip

    loaded = loaded_in(dtype)
    policies = with_states(loaded, policies_of(loaded, dtypes, longest or 0), state_dtype)
    tokens = [] if content is None else tokens_of(loaded, content)
    only_text = set(selection.parts) <= {FIDELITY, LAYERS}
    again = not only_text and task_dtype != dtype
    served = loaded
    if again:
        served = loaded_in(task_dtype)
    budget = step_tokens(max_num_batched_tokens, device)
    laboratory = Laboratory(loaded, policies, resume_cache, Bar, dtype, served, task_dtype, budget, state_dtype)
    run_tasks(laboratory, selection, tokens, book, sizes)
    rows = laboratory.results()
    if text is not None and state_dtype == AUTO:
        from kvbits.auto.record import remember

        remember(laboratory, text.name, tokens, note)
    from kvbits.cli.tables import print_results

    print_results(rows)
    if self_check:
        checked = check(laboratory, selection, tokens, sizes)
        for row in checked:
            note(f"{row['dtype']}: {row['verdict']}; {'noticed' if row['noticed'] else 'NOT noticed'}")
        rows += checked
    found = document(laboratory, rows, sizes, text, machine(device))
    results.write(found)
    if html is not None:
        from kvbits.evaluation.report import write_report

        write_report(html, found)
        print(f"report: {html}")
