"""Read the README: its fenced blocks, and the commands in them."""

from __future__ import annotations

import re

import support


class Block:
    """A fenced block: where it is, its language, and its lines."""

    def __init__(self, name: str, language: str, indent: str, first: int):
        self.name, self.language = name, language   # "Install 2"
        self.indent, self.first = indent, first     # of the README's lines
        self.lines: list[str] = []

    def commands(self) -> list[tuple[str, list[str]]]:
        """The commands behind a prompt, each with its output's lines."""
        found, lines = [], list(self.lines)
        while lines:
            line = lines.pop(0)
            if not line.startswith("$ "):
                found[-1][1].append(line)
                continue
            command = [line[2:]]
            end = re.search(r"<<'(\w+)'", line)
            while command[-1].endswith("\\") or \
                    end and command[-1] != end[1]:
                command.append(lines.pop(0))
            found.append(("\n".join(command), []))
        return found


def read_blocks(text: str) -> dict[str, Block]:
    """The fenced blocks of a README, named by their heading and number."""
    found, heading, block, number = {}, "", None, 0
    for row, line in enumerate(text.splitlines()):
        fence = re.match(r"( *)```(\w*)$", line)
        if block and fence:
            found[block.name] = block
            block = None
        elif block:
            block.lines.append(line.removeprefix(block.indent))
        elif fence:
            number += 1
            block = Block(f"{heading} {number}", fence[2], fence[1], row + 1)
        elif line.startswith("#"):
            heading, number = line.lstrip("# "), 0
    return found


README = support.ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = read_blocks(TEXT)


def commands(*names: str) -> list[str]:
    """What the README types in these blocks, for root."""
    return [re.sub(r"\bsudo ", "", command) for name in names
            for command, _ in BLOCKS[name].commands()]
