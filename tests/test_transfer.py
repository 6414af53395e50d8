"""Pages as a file: the same answers on the other side, and nothing that does not belong there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from helpers.serving import byte_model, engine_of, greedy
from helpers.tiny import save as save_tiny
from helpers.tiny import tiny_model
from safetensors import safe_open
from typer.testing import CliRunner

from kvbits import LLM, SamplingParams
from kvbits.cli.main import app
from kvbits.engine.transfer import PageBundle, export_pages, import_pages
from kvbits.errors import CacheError, ConfigError

PROMPT = random.Random(3).choices(range(3, 259), k=300)


def exported(**options: object) -> tuple[PageBundle, list[int]]:
    engine = engine_of(byte_model(), **options)
    answer, cached = greedy(engine, PROMPT)
    assert cached == 0
    return export_pages(engine, PROMPT), answer


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int4+sink:int8", "int4+sink:bf16"])
def test_another_engine_goes_on_from_a_file(dtype: str, tmp_path: Path) -> None:
    bundle, answer = exported(kv_cache_dtype=dtype)
    assert bundle.num_tokens == 256
    assert bundle.tokens.tolist() == PROMPT[:256]
    bundle.save(tmp_path / "pages")
    other = engine_of(byte_model(), kv_cache_dtype=dtype)
    assert import_pages(other, PageBundle.load(tmp_path / "pages")) == 256
    other.pages.check()
    assert other.pages.stats().sealed == 0
    assert greedy(other, PROMPT) == (answer, 256)
    # What went in comes out: byte for byte, wherever it lies now.
    again = export_pages(other, PROMPT)
    assert torch.equal(again.frames[: len(bundle.frames)], bundle.frames)


def test_a_bundle_is_found_under_its_salt_only() -> None:
    bundle, answer = exported()
    other = engine_of(byte_model())
    assert import_pages(other, bundle, salt="tenant") == 256
    assert greedy(other, PROMPT) == (answer, 0)
    assert export_pages(other, PROMPT, salt="tenant").num_tokens == 256
    assert greedy(other, PROMPT, salt="tenant") == (answer, 256)


def test_loading_beside_running_requests_takes_what_room_there_is() -> None:
    bundle, answer = exported()
    frame = engine_of(byte_model()).pool.layout.frame_bytes
    other = engine_of(byte_model(), kv_cache_memory=9 * frame)
    other.add_request(random.Random(4).choices(range(3, 259), k=150), SamplingParams(max_tokens=30, ignore_eos=True))
    while other.pages.stats().sealed < 2:
        other.step()
    loaded = import_pages(other, bundle)
    assert loaded == 64 * (other.pages.available() - other.pages.stats().free)
    assert 0 < loaded <= 256
    other.pages.check()
    while other.has_unfinished():
        other.step()
    assert greedy(other, PROMPT)[0] == answer


def test_pages_come_out_of_the_offload_tier_too() -> None:
    layout = engine_of(byte_model()).pool.layout
    frames = layout.frames_of(400)
    engine = engine_of(byte_model(), kv_cache_memory=frames * layout.frame_bytes, kv_offload_size=1 << 20)
    greedy(engine, PROMPT)
    greedy(engine, random.Random(5).choices(range(3, 259), k=390))
    assert engine.pages.stats().tier.stored > 0  # type: ignore[union-attr]
    bundle = export_pages(engine, PROMPT)
    assert bundle.num_tokens == 256
    assert torch.equal(bundle.frames, exported()[0].frames)


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    bundle, _ = exported(kv_cache_dtype="int4")
    with pytest.raises(ConfigError, match=r"the KV cache dtype 'int4'; this engine's is 'int8'"):
        import_pages(engine_of(byte_model()), bundle)
    with pytest.raises(ConfigError, match=r"of the model with the hash '[0-9a-f]{16}'; this engine's is"):
        import_pages(engine_of(byte_model(head_dim=32), kv_cache_dtype="int4"), bundle)
    with pytest.raises(CacheError, match="enable_prefix_caching is off"):
        import_pages(engine_of(byte_model(), kv_cache_dtype="int4", enable_prefix_caching=False), bundle)


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    bundle, _ = exported(kv_cache_dtype="int4")
    good = bundle.to_bytes()
    rest = PageBundle.from_bytes(good)
    assert torch.equal(rest.frames, bundle.frames)
    assert rest.identity == bundle.identity
    header = 8 + int.from_bytes(good[:8], "little")
    generator = random.Random(0)
    places = [*range(0, 24), *generator.sample(range(header, len(good)), 60)]
    engine = engine_of(byte_model(), kv_cache_dtype="int4")
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << generator.randrange(8)
        with pytest.raises(ConfigError):
            import_pages(engine, PageBundle.from_bytes(bytes(bad)))
    for size in (0, 5, 100, header, len(good) - 1):
        with pytest.raises(ConfigError, match="damaged"):
            PageBundle.from_bytes(good[:size])
    assert engine.pages.stats().cached == 0


def test_a_headers_lie_is_noticed() -> None:
    """Model, policy and layout are compared; what is changed there is another model's file."""
    bundle, _ = exported(kv_cache_dtype="int4")
    good = bundle.to_bytes()
    engine = engine_of(byte_model(), kv_cache_dtype="int4")
    for name in ("fingerprint", "policy", "layout"):
        value = bundle.identity[name].encode()
        bad = good.replace(b'"%s":"%s"' % (name.encode(), value), b'"%s":"%s"' % (name.encode(), b"x" * len(value)))
        assert bad != good
        with pytest.raises(ConfigError, match="holds pages of"):
            import_pages(engine, PageBundle.from_bytes(bad))


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    bundle, _ = exported(kv_cache_dtype="int4")
    bundle.save(tmp_path / "pages")
    with safe_open(tmp_path / "pages", "pt") as file:
        assert file.get_tensor("tokens").tolist() == PROMPT[:256]
        metadata = file.metadata()
    assert metadata["format"] == "kvbits-pages"
    assert metadata["policy"] == "int4"
    assert set(metadata) == {"format", "version", "model", "fingerprint", "policy", "layout", "sha256"}


def test_pages_of_an_older_version_are_refused_by_it() -> None:
    bundle, _ = exported()
    data = bundle.to_bytes()
    old = data.replace(b'"version":"2"', b'"version":"1"')
    assert old != data
    with pytest.raises(ConfigError, match="holds pages of version 1; this version reads 2"):
        PageBundle.from_bytes(old)


def test_four_bits_are_fewer_bytes_to_send() -> None:
    """On a model of the usual shape: 16 / 4.5, every scale and zero point counted."""
    sizes = {}
    for dtype in ("bf16", "int4"):
        engine = engine_of(byte_model(num_hidden_layers=8, head_dim=64), kv_cache_dtype=dtype, kv_cache_memory=16 << 20)
        greedy(engine, PROMPT)
        sizes[dtype] = export_pages(engine, PROMPT).num_bytes
    assert sizes["bf16"] / sizes["int4"] == pytest.approx(16 / 4.5, rel=0.02)


# The commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tiny_model("llama"), tmp_path_factory.mktemp("model"))


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in random.Random(1).choices(range(4, 97), k=count))


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_save_and_load(model: str, tmp_path: Path) -> None:
    file, facts = tmp_path / "pages", tmp_path / "facts.json"
    common = ("--kv-cache-dtype", "int4", "--kv-cache-memory", "4MiB", "--dtype", "float32")
    call("cache", "save", model, file, "--prompt", words(200), *common, "--json", facts)
    saved = json.loads(facts.read_text())
    assert saved["tokens"] == 192
    assert saved["file_bytes"] == file.stat().st_size > saved["page_bytes"] > 0
    prompt = f"{words(200)} w5 w6"
    out = call("cache", "load", model, file, "-p", prompt, "--max-tokens", 5, "--compare", *common, "--json", facts)
    loaded = json.loads(facts.read_text())
    assert loaded["answer"]["cached_tokens"] == 192
    assert loaded["load_seconds"] > 0
    assert loaded["prefill_seconds"] > 0
    llm = LLM(model, kv_cache_dtype="int4", kv_cache_memory="4MiB", dtype="float32", progress=False)
    text = llm.generate(prompt, SamplingParams(max_tokens=5, temperature=0))[0].outputs[0].text
    assert loaded["answer"]["text"] == text
    assert text in out


def test_wrong_files_are_one_line(model: str, tmp_path: Path) -> None:
    common = ("--kv-cache-memory", "4MiB", "--dtype", "float32")
    file = tmp_path / "pages"
    call("cache", "save", model, file, "--prompt", words(100), "--kv-cache-dtype", "int4", *common)
    with pytest.raises(ConfigError, match=r"'.*pages' holds pages of the KV cache dtype 'int4'"):
        call("cache", "load", model, file, *common)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"'.*pages' is damaged: its checksum is another one"):
        call("cache", "load", model, file, "--kv-cache-dtype", "int4", *common)
    with pytest.raises(ConfigError, match=r"cannot read '.*nothing': No such file"):
        call("cache", "load", model, tmp_path / "nothing", *common)
    with pytest.raises(CacheError, match="no full page of the prompt of 3 tokens is cached"):
        call("cache", "save", model, file, "--prompt", "w5 w6 w7", *common)
    call("cache", "save", model, file, "--prompt", words(400), "--kv-cache-dtype", "int4", *common)
    memory = 4 * PageBundle.load(file).frames.shape[1]
    with pytest.raises(CacheError, match=r"has room for [0-9]+ of the 384 tokens"):
        call("cache", "load", model, file, "--kv-cache-dtype", "int4", "--kv-cache-memory", memory, *common[2:])


def test_the_real_models_pages_move_to_another_engine(tmp_path: Path) -> None:
    text = topics["FORMATTING" if "FORMATTING" in topics else sorted(topics)[0]][:600]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    options = {"kv_cache_dtype": "int4", "kv_cache_memory": "64MiB", "batch_invariant": True, "progress": False}
    one = LLM("smollm2-135m", **options)
    computed = one.generate(text, params)[0]
    bundle = one.save_cache(tmp_path / "pages", text)
    two = LLM(one.loaded, **options)
    two.load_cache(tmp_path / "pages")
    moved = two.generate(text, params)[0]
    assert moved.num_cached_tokens == bundle.num_tokens >= len(computed.prompt_token_ids) - 64
    assert moved.outputs[0].token_ids == computed.outputs[0].token_ids
    assert moved.outputs[0].logprobs == computed.outputs[0].logprobs


def test_a_bundle_of_nothing_is_a_bundle_too() -> None:
    engine = engine_of(byte_model())
    empty = export_pages(engine, [5, 6, 7])
    found = PageBundle.from_bytes(empty.to_bytes())
    assert (found.num_tokens, found.num_bytes) == (0, 0)
    assert import_pages(engine, found) == 0
    engine.pages.check()
