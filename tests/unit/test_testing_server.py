"""What the server of the testing kit says of a server that goes away."""

from __future__ import annotations

import json
import socket
import threading
import tomllib
from pathlib import Path

import pytest

from rethaw.testing.server import RunningServer, toml


@pytest.mark.parametrize("said", [b"", b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"id'])
def test_a_server_that_is_killed_in_the_middle_of_an_answer_is_not_there(tmp_path: Path, said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        server = RunningServer(data_dir=tmp_path / "data")
        server.data_dir.mkdir()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        (server.data_dir / "server.json").write_text(json.dumps({"url": url}))
        with pytest.raises(OSError, match=r"broke off|closed connection"):
            server.request("GET", "/v1/sessions")
        thread.join()


def test_a_price_of_many_models_kept_the_server_from_starting() -> None:
    config = {
        "prices": {"gpt-5-mini*": {"input": 1.0}},
        "providers": {"openai": {"key": "k", "hosts": ["a", "b"]}},
        "port": 0,
    }
    assert tomllib.loads(toml(config)) == config
