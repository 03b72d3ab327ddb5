"""Runs of train.py in a process that is watched: python -m tests.integration.watched_runs REPORT RUNS

REPORT gets a line [event, place, process] for every other machine that one of its processes asks for, which is refused,
and for every program that one starts. RUNS is a JSON list of runs, each a list of options for train.py.
The word "raise" at their head ends a run after its first step with an exception that quotes them; "bare" leaves all
secrets where they are. Before a run stderr gets the line HEAD, and stdout gets the exit codes of all at the end.
"""

import json
import os
import socket
import sys

HEAD = "--- run"
LOOPBACK = {None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1"}
CONNECTIONS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def watch(report: str) -> None:
    """Cannot be undone, and holds in processes that are forked."""
    lines = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple) -> None:
        if event == "subprocess.Popen":
            os.write(lines, f"{json.dumps([event, str(arguments[0]), os.getpid()])}\n".encode())
        place = arguments[1] if event in CONNECTIONS else arguments[0] if event in LOOKUPS else None
        host = place[0] if isinstance(place, tuple) else place
        is_file = event in CONNECTIONS and not isinstance(place, tuple)  # a socket of this machine
        if not is_file and host not in LOOPBACK:
            os.write(lines, f"{json.dumps([event, str(host), os.getpid()])}\n".encode())
            raise OSError(f"{host} is not to be asked for")

    sys.addaudithook(note)


def raise_after_a_step(options: list[str]) -> None:
    def train(self, after_step):
        self.train_step(iter(self.loader))
        raise RuntimeError(f"{options} with {os.environ['HF_TOKEN']}")

    train_module.FluxTrainer.train = train


def leave_secrets() -> None:
    import redact

    functions = {redact.redact: "redact", redact.redact_values: "redact_values"}
    for module in list(sys.modules.values()):
        for function, name in functions.items():
            if vars(module).get(name) is function:
                setattr(module, name, lambda values: values)


def run(options: list[str]) -> int:
    print(HEAD, file=sys.stderr, flush=True)
    act, whole_run = {"raise": raise_after_a_step, "bare": lambda _: leave_secrets()}, train_module.FluxTrainer.train
    if options[0] in act:
        act[options[0]](options := options[1:])
    try:
        train_module.main(options)
    except SystemExit as end:
        return end.code
    finally:
        train_module.FluxTrainer.train = whole_run
    return 0


if __name__ == "__main__":
    watch(sys.argv[1])
    os.umask(0o022)
    import train as train_module
    from flux.data import storage

    storage.PAUSE_SECONDS = 0.001
    print(json.dumps([run(options) for options in json.loads(sys.argv[2])]), flush=True)
    assert os.umask(0) == 0o022, "a run puts back what it has changed"
    assert not socket.getdefaulttimeout()
