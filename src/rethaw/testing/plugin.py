"""A pytest plugin for tests of agents: the fixture `rethaw_server` is a real server with a scripted model.

It comes with the package. Where plugins are not found by themselves (`PYTEST_DISABLE_PLUGIN_AUTOLOAD`), write
`pytest_plugins = ["rethaw.testing.plugin"]`. All heavy imports happen when the fixture is first used.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rethaw.testing.agents import AgentServer

REQUIRED = "RETHAW_TEST_REQUIRED"  # set it in CI, so that a machine without an engine is no green run


@pytest.fixture(scope="session")
def rethaw_config() -> Mapping[str, Any]:
    """Tables of the server's rethaw.toml; define a fixture of this name to change them."""
    return {}


@pytest.fixture(scope="session")
def rethaw_session_server(rethaw_config: Mapping[str, Any]) -> Iterator[AgentServer]:
    """The server under `rethaw_server`, one for each run of pytest."""
    from rethaw.model.errors import RethawError
    from rethaw.testing.agents import AgentServer, missing

    why = missing()
    if why is not None:
        if os.environ.get(REQUIRED, "") not in ("", "0"):
            pytest.fail(f"{why} ({REQUIRED} is set)", pytrace=False)
        pytest.skip(why)
    server, problem = None, ""
    try:
        server = AgentServer(rethaw_config).open()
    except RethawError as error:
        problem = f"{error}\n{error.details.get('log', '')}".rstrip()
    if server is None:
        pytest.fail(problem, pytrace=False)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def rethaw_server(rethaw_session_server: AgentServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentServer]:
    """A server without sessions and a model that nothing was scripted for. RETHAW_URL and RETHAW_TOKEN name it, so that
    `agent.start()`, `Client()` and the command line find it as well."""
    rethaw_session_server.reset()
    monkeypatch.setenv("RETHAW_URL", rethaw_session_server.url)
    monkeypatch.setenv("RETHAW_TOKEN", rethaw_session_server.token)
    yield rethaw_session_server
    rethaw_session_server.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails tells what its sessions did."""
    report = yield
    if call.when == "call" and report.failed:
        used: Mapping[str, Any] = getattr(item, "funcargs", {})
        server = used.get("rethaw_server")
        if server is not None:
            report.sections.append(("rethaw", server.report()))
    return report
