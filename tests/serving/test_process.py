"""What only a whole process shows: its forks, an interrupt, and its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import os, signal, sys, threading, time
import torch
import fxopt
from tests.serving.models import Held, words

four = (torch.arange(20).reshape(4, 5), torch.randn(4, 8))
compiled = words()
idle = compiled.serve(workers=2, max_batch=9, max_wait_ms=1e6)
waiting = idle.submit(*four)

def shape(future):
    return tuple(future.result(30)["scores"].shape)

def fork():
    server = compiled.serve()
    print("parent", shape(server.submit(*four)), shape(compiled.submit(*four)))
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for submit in (server.submit, compiled.submit):
            try:
                submit(*four)
            except fxopt.FxoptError as error:
                print("child", type(error).__name__, error)
        server.close()
        with compiled.serve() as own:
            print("child", shape(own.submit(*four)))
        sys.exit(5)
    print("parent", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("parent", shape(server.submit(*four)))

def interrupt(wait):
    held = Held(words())
    try:
        with held.compiled.serve(queue_size=1) as server:
            running = server.submit(*four)
            held.wait_until_one_runs()
            queued = server.submit(*four)
            queued.add_done_callback(lambda future: held.gate.set())  # once it is cancelled
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            wait(server, queued)
            time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", running.done(), queued.cancelled(), "closed" in repr(server))

fork()
interrupt(lambda server, queued: queued.result())
interrupt(lambda server, queued: server.submit(*four))

held = Held(words())  # and now the end, in the middle of everything
busy = held.compiled.serve(workers=2)
futures = [waiting, *(busy.submit(*four) for _ in range(5)), held.compiled.submit(*four)]
cancelled = []

def end(future):
    sys.stdout.write(f"end {future.cancelled()}\\n")  # in one piece: workers end at once
    cancelled.extend([future] if future.cancelled() else [])
    if len(cancelled) == 4:
        held.gate.set()

for future in futures:
    future.add_done_callback(end)
for _ in range(3):
    held.wait_until_one_runs()
sys.exit(7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_with_servers_forks_is_interrupted_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 7 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    parent = [line for line in lines if line.startswith("parent")]
    assert parent == ["parent (4, 4) (4, 4)", "parent 5", "parent (4, 4)"]
    child = [line for line in lines if line.startswith("child")]
    assert child.pop() == "child (4, 4)" and len(child) == 2
    assert all("ServerClosed This process is a fork" in line for line in child)
    assert lines.count("interrupted True True True") == 2
    # three of them ran and were answered, four only waited
    assert sorted(line for line in lines if line.startswith("end")) == (
        ["end False"] * 3 + ["end True"] * 4
    )
