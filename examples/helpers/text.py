"""Text as tokens, and shuffled batches of its windows, which can resume at any batch."""

import dataclasses
import pathlib
import shutil
import subprocess
from typing import Literal

import grain
import numpy as np

Level = ("byte", "character")


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of a text, split into a training part and a held-out part.

    Attributes:
      train: Training tokens, the first part of the text.
      held_out: Held-out tokens, the last part of the text.
      symbols: The character of each token number.
      bytes_per_token: Mean number of UTF-8 bytes per token in the held-out part.
    """

    train: np.ndarray
    held_out: np.ndarray
    symbols: list[str]
    bytes_per_token: float


def read(path: pathlib.Path | None) -> str:
    """The text of a file; without a path, the King James Bible of Debian's package bible-kjv."""
    if path is None:
        program = shutil.which("bible")
        if program is None:
            raise SystemExit(
                "language.py: --text: expected the path of a text in UTF-8, because Debian's "
                "package bible-kjv is not installed. apt-get install bible-kjv installs the King "
                "James Bible."
            )
        command = [program, "-f", "Gen1:1-Rev22:21"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"language.py: --text: {path}: expected text in UTF-8, found the byte "
            f"{error.object[error.start]:#04x} at position {error.start}"
        ) from None
    except OSError as error:
        raise SystemExit(f"language.py: --text: {path}: {error.strerror}") from None


def encode(text: str, level: Literal["byte", "character"], held_out: float = 0.05) -> Text:
    """Tokenizes a text: a token is a UTF-8 byte, or the number of a distinct character."""
    if level == "byte":
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        symbols = [chr(byte) if byte < 128 else "\N{REPLACEMENT CHARACTER}" for byte in range(256)]
    else:
        symbols = sorted(set(text))
        number = {symbol: i for i, symbol in enumerate(symbols)}
        tokens = np.array([number[symbol] for symbol in text], np.int32)
    split = len(tokens) - int(held_out * len(tokens))
    last = text[split:].encode() if level == "character" else tokens[split:]
    return Text(tokens[:split], tokens[split:], symbols, len(last) / max(1, len(tokens) - split))


class Windows:
    """Adjacent windows of `length` inputs, each with one more token: the target of the last."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[i * self.length : (i + 1) * self.length + 1]


def batches(tokens: np.ndarray, length: int, batch: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator of batches (batch, length + 1); windows are reshuffled every pass."""
    windows = grain.MapDataset.source(Windows(tokens, length)).seed(seed).shuffle().repeat()
    return iter(windows.batch(batch, drop_remainder=True).to_iter_dataset())
