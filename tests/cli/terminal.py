"""A command in a terminal of its own, as a person would see it."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

SETS = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "TERM")  # what would change how things look
ABLATION = [sys.executable, "-m", "ablation.cli"]


def plain_environment(**environment: str) -> dict[str, str]:
    """This process's environment, with nothing in it about looks but what is given."""
    return {name: value for name, value in os.environ.items() if name not in SETS} | environment


def in_terminal(command: list[str], columns: int = 100, **environment: str) -> str:
    """What a command writes, on stdout and stderr together, where both are a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    chosen = plain_environment(**{"TERM": "xterm-256color", **environment})
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=chosen, start_new_session=True):
        os.close(slave)
        said = b""
        try:
            while piece := os.read(master, 65536):
                said += piece
        except OSError:  # Linux says so where nobody has the terminal open any more
            pass
    os.close(master)
    return said.decode().replace("\r\n", "\n")
