"""Every command of `rethaw`, in the order of the help: where it is and what it does in one line.

The help of `rethaw` itself is made of this alone, so that it comes without loading any command.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`where` is "module:function" below `rethaw.cli.commands`. `name` has a space when it belongs to a group."""

    name: str
    where: str
    summary: str
    form: str = ""
    aliases: tuple[str, ...] = ()


STREAM = "\0-"  # what "-" is for cyclopts, which takes that for an option

GROUPS: dict[str, tuple[Command, ...]] = {
    "Server": (
        Command("up", "server:up", "Start everything on this machine (as root)."),
        Command("doctor", "server:doctor", "Check that agents can run here, and say what is missing."),
        Command("init", "start:init", "Write a new project: an agent, its tests, a README.", "[DIR]"),
    ),
    "Sessions": (
        Command(
            "run",
            "run:run",
            "Start a session and watch it.",
            "FILE.py[::NAME] [--ARG VALUE ...] | --agent NAME[@VERSION] ... | --image base -- COMMAND ...",
        ),
        Command("attach", "attaching:attach", "Come back to a session's terminal.", "SESSION"),
        Command("ls", "look:ls", "List sessions.", aliases=("ps",)),
        Command("top", "top:top", "Watch what sessions take: CPU, memory, model calls, storage."),
        Command("show", "look:show", "Show a session, and what durability did for it.", "SESSION"),
        Command("why", "look:why", "Say what a session waits for and what wakes it.", "SESSION"),
        Command("events", "watch:events", "Print the context log.", "SESSION"),
        Command("logs", "watch:logs", "Print what the program wrote.", "SESSION"),
        Command("send", "act:send", "Send a message into a session's inbox.", "SESSION TEXT"),
        Command("signal", "act:signal", "Complete a wait by its name.", "SESSION NAME [PAYLOAD]"),
        Command("suspend", "act:suspend", "Freeze a session and release its memory.", "SESSION"),
        Command("resume", "act:resume", "Let a suspended session go on.", "SESSION"),
        Command("cancel", "act:cancel", "End a session.", "SESSION"),
        Command("fork", "branch:fork", "Begin new sessions from where a session is or was.", "SESSION"),
        Command(
            "rewind", "branch:rewind", "Take a session back to an older point of its log.", "SESSION --to SNAPSHOT|SEQ"
        ),
        Command("retry", "limits:retry", "Begin the next attempt of a session now.", "SESSION"),
        Command("budget", "limits:budget", "Show or change what a session may spend.", "SESSION"),
        Command("rm", "act:rm", "Erase sessions whole.", "SESSION ..."),
        Command("crash", "act:crash", "Perform a crash, safely.", "SESSION [sandbox|node|db]"),
        Command("snapshot ls", "look:snapshot_ls", "List a session's snapshots.", "SESSION"),
        Command("snapshot create", "keep:create", "Take a snapshot now.", "SESSION"),
        Command("snapshot pin", "keep:pin", "Keep a snapshot whatever retention says.", "SNAPSHOT"),
        Command("snapshot unpin", "keep:unpin", "Leave a snapshot to retention again.", "SNAPSHOT"),
        Command("snapshot export", "keep:export", "Write a snapshot into a file.", "SNAPSHOT FILE"),
        Command("snapshot import", "keep:import_", "Make a session of an exported file.", "FILE"),
    ),
    "Versions": (
        Command("deploy", "agent:deploy", "Register a version of an agent.", "FILE.py[::NAME]"),
        Command(
            "upgrade",
            "agent:upgrade",
            "Let a session go on with another version of its agent.",
            "SESSION [FILE.py[::NAME] | --to VERSION] | --all-of AGENT",
        ),
        Command("agent ls", "agent:ls", "List agents."),
        Command("agent show", "agent:show", "Show an agent's versions and who runs which.", "NAME"),
        Command("agent pin", "agent:pin", "Let starts by name take one version.", "NAME VERSION"),
        Command("agent unpin", "agent:unpin", "Let them take what was deployed last.", "NAME"),
    ),
    "Looking inside": (
        Command("shell", "inspect:shell", "Open a shell inside a snapshot.", "SNAPSHOT [-- COMMAND ...]"),
        Command("diff", "inspect:diff", "Say what changed between two snapshots.", "BEFORE AFTER"),
        Command("snapshot files", "inspect:files", "List files of a snapshot.", "SNAPSHOT [PATH]"),
        Command("snapshot cat", "inspect:cat", "Print a file of a snapshot.", "SNAPSHOT PATH"),
        Command("snapshot get", "inspect:get", "Copy files out of a snapshot.", "SNAPSHOT PATH DESTINATION"),
        Command("snapshot verify", "inspect:verify", "Check every stored byte.", "SNAPSHOT|SESSION ... | --all"),
    ),
    "Images": (
        Command("image ls", "image:ls", "List images."),
        Command(
            "image build",
            "image:build",
            "Build an image before it is needed.",
            "[DIR|rethaw.toml|ARCHIVE|FILE.py[::NAME]|NAME]",
        ),
        Command("image inspect", "image:inspect", "Show an image's layers and who needs it.", "IMAGE"),
        Command("image rm", "image:rm", "Remove images.", "IMAGE ..."),
    ),
    "Reaching in": (
        Command("exec", "inside:exec_", "Run a command in a running session's sandbox.", "SESSION -- COMMAND ..."),
        Command(
            "cp", "inside:cp", "Copy files into a sandbox or out of it.", "SESSION:PATH LOCAL | LOCAL SESSION:PATH"
        ),
        Command(
            "forward", "ports:forward", "Let ports of this machine lead to a session's.", "SESSION PORT[:LOCALPORT] ..."
        ),
        Command("link", "ports:link", "Print an address of a session's port that expires.", "SESSION PORT"),
    ),
    "Templates": (
        Command(
            "template create",
            "template:create",
            "Warm an agent, to start sessions from.",
            "NAME FILE.py[::NAME] | NAME --image base -- COMMAND ...",
        ),
        Command("template start", "template:start", "Start a session from a template.", "NAME [ARGS]"),
        Command("template ls", "template:ls", "List templates."),
        Command("template rm", "template:rm", "Remove a template.", "NAME"),
    ),
    "Queues": (
        Command("queue ls", "queue:ls", "List queues."),
        Command("queue set", "queue:set_", "Limit how many sessions run at once.", "NAME [--limit N] [--key-limit N]"),
        Command("queue show", "queue:show", "Show a queue and who is next.", "NAME"),
        Command("queue pause", "queue:pause", "Start nothing from a queue.", "NAME"),
        Command("queue resume", "queue:resume", "Start from a paused queue again.", "NAME"),
        Command("queue rm", "queue:rm", "Forget a queue's limits.", "NAME"),
    ),
    "Schedules": (
        Command(
            "schedule create",
            "schedule:create",
            "Start sessions by the clock.",
            "NAME --cron LINE|--every TIME FILE.py[::AGENT] [--ARG VALUE ...]",
        ),
        Command("schedule ls", "schedule:ls", "List schedules."),
        Command("schedule show", "schedule:show", "Show a schedule and its last times.", "NAME"),
        Command("schedule pause", "schedule:pause", "Start nothing by a schedule.", "NAME"),
        Command("schedule resume", "schedule:resume", "Go on with a paused schedule.", "NAME"),
        Command("schedule trigger", "schedule:trigger", "Start a session of a schedule now.", "NAME"),
        Command("schedule rm", "schedule:rm", "Remove a schedule.", "NAME"),
    ),
    "More": (
        Command("mcp", "mcp:mcp", "Serve sessions to MCP clients, on stdin and stdout or over HTTP."),
        Command("completion", "completion:completion", "Print the completion script of a shell.", "[bash|zsh|fish]"),
        Command("version", "look:version", "Print the version of this program and of the server."),
    ),
}
GROUP_HELP = {
    "agent": "Agents by name, and their versions.",
    "snapshot": "Snapshots of a session.",
    "image": "What sandboxes are made of.",
    "template": "Warm agents that sessions are started from.",
    "queue": "How many sessions run at once, and who is next.",
    "schedule": "Sessions that start by the clock.",
}

COMMANDS: tuple[Command, ...] = tuple(command for group in GROUPS.values() for command in group)


def root_help() -> str:
    """The text of `rethaw --help`."""
    width = max(len(command.name) for command in COMMANDS) + 2
    lines = ["Rethaw: AI agents that survive anything.", "", "Usage: rethaw COMMAND [OPTIONS]"]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:"]
        for command in commands:
            also = f" (also: {', '.join(command.aliases)})" if command.aliases else ""
            lines.append(f"  {command.name:<{width}}{command.summary}{also}")
    lines += [
        "",
        "A SESSION is an id or any unique beginning of one. Every command takes --json and --help.",
        "",
        "Begin with:",
        "  sudo rethaw up --detach",
        "  rethaw run examples/hello.py",
    ]
    return "\n".join(lines) + "\n"


def group_help(group: str) -> str:
    """The text of `rethaw GROUP --help`."""
    mine = [command for command in COMMANDS if command.name.startswith(f"{group} ")]
    width = max(len(command.name) for command in mine) + 2
    lines = [GROUP_HELP[group], "", f"Usage: rethaw {group} COMMAND [OPTIONS]", ""]
    lines += [f"  {command.name:<{width}}{command.summary}" for command in mine]
    return "\n".join([*lines, "", f"What a command takes: rethaw {mine[0].name} --help"]) + "\n"
