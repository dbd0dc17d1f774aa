"""A pseudo-terminal, with what a person would see on it."""

import codecs
import fcntl
import os
import re
import struct
import termios
import threading
import unicodedata
from typing import TextIO

_PIECE = re.compile(r"\x1b\[(?P<numbers>[0-9;?]*)(?P<command>[A-Za-z])|(?P<character>[^\x1b])", re.DOTALL)


class Screen:
    """As much of a terminal as progress bars and tables use; lines that have left its top stay there to be read."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.moments: list[str] = []
        """What was on it whenever something was drawn on."""

    def feed(self, text: str) -> None:
        for piece in _PIECE.finditer(text):
            if (character := piece["character"]) is not None:
                self._put(character)
            else:
                self._control(piece["command"], piece["numbers"])

    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.lines)

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
            self.moments.append(self.text())
        elif character == "\n":
            self._down()
            self.moments.append(self.text())
        elif character >= " ":
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if self.column + width > self.columns:
                self._down()
                self.column = 0
            line = self.lines[self.row]
            line.extend(" " * (self.column + width - len(line)))
            line[self.column : self.column + width] = [character] + [""] * (width - 1)
            self.column += width

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def _control(self, command: str, numbers: str) -> None:
        if command == "A":
            self.row = max(self.row - int(numbers or 1), 0)
        elif command == "K":
            keep = 0 if numbers == "2" else self.column
            self.lines[self.row] = self.lines[self.row][:keep]
        elif command not in "mhl":  # colours, and whether the cursor can be seen
            raise NotImplementedError(f"the control sequence {numbers}{command}")


class Terminal:
    """A pseudo-terminal of this process: write to ``stream``, and ``close`` it to have the screen."""

    def __init__(self, columns: int = 80) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.stream: TextIO = os.fdopen(theirs, "w", encoding="utf-8", buffering=1)
        self._screen = Screen(columns)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> Screen:
        self.stream.close()
        self._reader.join(10)
        return self._screen

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with os.fdopen(self._ours, "rb", buffering=0) as file:
            while True:
                try:
                    data = file.read(4096)
                except OSError:  # Linux says so when the other end is closed
                    return
                if not data:
                    return
                self._screen.feed(decoder.decode(data))
