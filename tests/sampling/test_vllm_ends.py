"""A server that a run has started ends when the run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import sys
from pathlib import Path
from rlt.sampling.vllm_server import start_server
start_server(sys.argv[1], Path("model"), "base", [], Path("log"), 1, 60)
"""
SERVER = "#!/bin/sh\necho $$ > pid\nexec sleep 60\n"


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_process_that_started_it(tmp_path: Path, how: signal.Signals) -> None:
    server = tmp_path / "server"
    server.write_text(SERVER)
    server.chmod(0o755)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(server)], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    written = tmp_path / "pid"
    end = time.monotonic() + 60
    while not (written.is_file() and written.read_text()):
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.05)
    pid = int(written.read_text())
    assert is_alive(pid)
    os.kill(parent.pid, how)
    parent.wait(timeout=30)
    while is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.05)
