"""API keys: where they come from, what they permit, equal shares, and what one key can learn of another's prompts."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.serving import MODEL, Running, engine_of, greedy, running
from typer.testing import CliRunner

from kvbits.cli.keys import VARIABLE, client_key, server_keys
from kvbits.cli.main import app
from kvbits.engine.transfer import export_pages, import_pages
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.ray.prefix import block_hashes
from kvbits.server.keys import ApiKey, Keyring, read_keys
from kvbits.server.logs import JsonLines
from kvbits.server.options import ServerOptions

TEXT = "/v1/completions"
SECRET = "the quick brown fox jumps over the lazy dog; the password is swordfish. " * 3
KEYS = (ApiKey("ka", "anna"), ApiKey("kb", "bert"), ApiKey("kp", "paid", frozenset({"priority", "operator"})))


def ask(server: Running, key: str | None, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": SECRET, "max_tokens": 2, "temperature": 0, **fields}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(server.url + TEXT, json=body, headers=headers, timeout=60)


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(
        "\ufeff# ours\nsk-1\n\n  sk-2  name=anna  # she\nsk-3 name=bert priority operator\n", encoding="utf-8"
    )
    assert read_keys(path) == (
        ApiKey("sk-1"), ApiKey("sk-2", "anna"), ApiKey("sk-3", "bert", frozenset({"priority", "operator"})),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "no API key"), ("# sk-1\n", "no API key"), ("sk-1\nsk-2 sk-3\n", "line 2"), ("sk-1 name=a,b", "line 1"),
     ("sk-1\nsk-1 priority\n", "line 2"), ("sk-1 Priority", "priority")],
)  # fmt: skip
def test_a_wrong_file_is_refused_without_the_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as refused:
        read_keys(path)
    assert "sk-" not in str(refused.value)
    with pytest.raises(ConfigError, match="absent"):
        read_keys(tmp_path / "absent")


def test_where_a_key_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text("filed name=anna\nother\n")
    path.chmod(0o600)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert (client_key(None, None), server_keys(None, None)) == (None, ())
    monkeypatch.setenv(VARIABLE, "environment")
    assert client_key(None, None) == "environment"
    assert client_key(None, path) == "filed"
    assert client_key("given", path) == "given"
    assert server_keys(None, None) == (ApiKey("environment"),)
    assert [key.secret for key in server_keys(["given", "filed"], path)] == ["given", "filed", "other"]
    assert "read" not in capsys.readouterr().err
    path.chmod(0o644)
    server_keys(None, path)
    said = capsys.readouterr().err
    assert str(path) in said
    assert "filed" not in said
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ConfigError, match="API key"):
        server_keys(None, None)


def test_the_commands_of_clients_take_a_key_from_anywhere(
    byte_loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    path.write_text("kf\n")
    path.chmod(0o600)
    monkeypatch.delenv(VARIABLE, raising=False)
    with running(engine_of(byte_loaded), api_keys=("kf",)) as server:
        look = ["top", server.url, "--once"]
        assert "API key" in str(CliRunner().invoke(app, look).exception)
        assert CliRunner().invoke(app, [*look, "--api-key-file", str(path)]).exit_code == 0
        assert CliRunner().invoke(app, look, env={VARIABLE: "kf"}).exit_code == 0


def test_keys_show_nowhere(byte_loaded: LoadedModel) -> None:
    options = ServerOptions(MODEL, api_keys=("hidden-1", ApiKey("hidden-2", "anna")))
    assert "hidden" not in repr(options) + repr(options.keyring.client_ids) + repr(ApiKey("hidden-3"))
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    logger, handler = logging.getLogger("kvbits"), Keep()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel("DEBUG")
    try:
        with running(engine_of(byte_loaded), api_keys=options.api_keys) as server:
            assert ask(server, "hidden-2").status_code == 200
            assert ask(server, "hidden-1").status_code == 200
            assert ask(server, "hidden-wrong").status_code == 401
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    access = [json.loads(line) for line in lines if '"request"' in line]
    assert [line.get("key") for line in access if line["path"] == TEXT] == ["anna", None, None]
    assert "hidden" not in "".join(lines)


def test_keys_of_one_name_are_one_client() -> None:
    ring = Keyring([ApiKey("new", "anna"), ApiKey("old", "anna"), ApiKey("other"), ApiKey("größer")])
    assert len(ring.client_ids) == 3
    assert ring.client(b"Bearer new") == ring.client(b"bearer  old")
    assert ring.client("Bearer größer".encode()) == ApiKey("größer").client
    for wrong in (b"", b"new", b"Basic new", b"Bearer ", b"Bearer new2", b"Bearer \xff"):
        assert ring.client(wrong) is None
    # a name that looks like another one's key makes nobody that one
    assert ApiKey("x", "other").client.id != ApiKey("other").client.id


def test_a_key_learns_nothing_of_what_another_one_asked(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), api_keys=KEYS) as server:
        assert cached(ask(server, "ka")) == 0
        assert cached(ask(server, "kb")) == 0
        assert cached(ask(server, "ka")) == 192
        # also not by writing what the other one's pages are kept under
        for salt in (KEYS[0].client.id, "anna", "ka", "name:anna"):
            assert cached(ask(server, "kb", cache_salt=salt)) == 0
        assert cached(ask(server, "ka", cache_salt="x")) == 0
        assert cached(ask(server, "ka", cache_salt="x")) == 192


def test_sharing_is_an_option(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), api_keys=KEYS, share_prefix_cache=True) as server:
        assert cached(ask(server, "ka")) == 0
        assert cached(ask(server, "kb")) == 192
    with running(engine_of(byte_loaded), api_keys=("one",)) as server:
        assert cached(ask(server, "one")) == 0
        assert cached(ask(server, "one")) == 192
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "250"}).output
    assert "guessing" in help_text[help_text.index("--share-prefix-cache") :]


def test_pages_of_a_file_are_everybodys(byte_loaded: LoadedModel) -> None:
    tokens = byte_loaded.tokenizer(SECRET)["input_ids"]
    source = engine_of(byte_loaded)
    greedy(source, tokens)
    bundle = export_pages(source, tokens)
    options = pickle.loads(pickle.dumps(ServerOptions(MODEL, api_keys=KEYS)))
    assert len(set(options.salts)) == 3
    engine = engine_of(byte_loaded)
    for salt in options.salts:
        assert import_pages(engine, bundle, salt) == 192
    with running(engine, api_keys=options.api_keys) as server:
        assert [cached(ask(server, key)) for key in ("ka", "kb")] == [192, 192]
        assert ServerOptions(MODEL, api_keys=("one",)).salts == ServerOptions(MODEL).salts == ("",)


def test_sessions_are_shown_to_their_key_only(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), api_keys=KEYS) as server:
        thread = threading.Thread(target=ask, args=(server, "ka"), kwargs={"max_tokens": 600, "ignore_eos": True})
        thread.start()
        seen: dict[str, int] = {}
        while thread.is_alive() and not all(seen.values() or [0]):
            for key in ("ka", "kp"):
                state = httpx.get(server.url + "/kvbits/state", headers={"Authorization": f"Bearer {key}"}).json()
                seen[key] = len(state["sessions"])
            other = httpx.get(server.url + "/kvbits/state", headers={"Authorization": "Bearer kb"}).json()
            assert other["sessions"] == []
        thread.join(60)
        assert seen == {"ka": 1, "kp": 1}


def test_routing_tells_keys_apart() -> None:
    text = "t" * 1000
    assert block_hashes(text, b"a") == block_hashes(text, b"a")
    assert not set(block_hashes(text, b"a")) & set(block_hashes(text, b"b"))


@pytest.mark.parametrize(
    ("options", "key", "status"),
    [({}, None, 403), ({"allow_priority": True}, None, 200), ({"api_keys": KEYS}, "ka", 403),
     ({"api_keys": KEYS}, "kp", 200), ({"api_keys": KEYS, "allow_priority": True}, "ka", 200)],
)  # fmt: skip
def test_priority_needs_permission(
    byte_loaded: LoadedModel, options: dict[str, Any], key: str | None, status: int
) -> None:
    with running(engine_of(byte_loaded), **options) as server:
        assert ask(server, key, priority=0).status_code == 200
        answer = ask(server, key, priority=-5)
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["param"] == "priority"
            assert "--allow-priority" in answer.json()["error"]["message"]
        else:
            beyond = ask(server, key, priority=1001)
            assert beyond.status_code == 400
            assert "1000" in beyond.json()["error"]["message"]


def test_a_key_that_fills_the_queue_does_not_shut_out_another(byte_loaded: LoadedModel) -> None:
    engine = engine_of(byte_loaded, max_num_seqs=4, kv_cache_memory=16 << 20)
    long = {"max_tokens": 700, "ignore_eos": True, "prompt": "abc"}
    with running(engine, api_keys=KEYS, max_queue=16) as server:
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server, "ka", n=10, **long))) for _ in range(2)]
        for thread in threads:
            thread.start()
        while server.service.worker.snapshot.load.clients.get(KEYS[0].client.id) != 20:
            assert not answers, answers[0].text
        # full for the one that fills it, open to the other, up to its half
        assert ask(server, "ka").status_code == 429
        assert ask(server, "kb", n=11).status_code == 429
        assert ask(server, "kb", n=5).status_code == 200
        assert not answers, "the one that came last had to wait for those before it"
        server.service.worker.abort_all("enough")
        for thread in threads:
            thread.join(60)
        server.idle()
