"""Processes that encode chunks: `python -m align.data.store.worker`, which the builder of an entry starts.

Messages are pickles on the standard input and output. The first is a `Job`; each later one is (shard number, chunk,
selected rows), answered with the number of rows, or with the text of a `UserError`.

The processes are not `multiprocessing` workers, which import the caller's main module again.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.config.filters import DuplicateFilter
from align.data.encode import Encoding, RowEncoder
from align.data.store.reading import ChunkGroup
from align.data.store.shards import ShardWriter
from align.errors import UserError

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """Settings that all shards of an entry share."""

    folder: Path
    encoding: Encoding
    tokenizer: PreTrainedTokenizerBase

    def writer(self) -> ShardWriter:
        encoding = self.encoding
        duplicates = next((f for f in encoding.filters if isinstance(f, DuplicateFilter)), None)
        return ShardWriter(self.folder, encoding.kind, RowEncoder(encoding, self.tokenizer), duplicates)


class Worker:
    """A process that encodes chunks."""

    def __init__(self, job: bytes):
        root = str(Path(__file__).parents[3])
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "align.data.store.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._send(job)

    def encode(self, number: int, chunk: ChunkGroup, selected: np.ndarray | None) -> int:
        """Encode a chunk and return the number of its rows. Raises its `UserError`, if any."""
        self._send(pickle.dumps((number, chunk, selected)))
        assert self.process.stdout is not None
        try:
            answer: int | str = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self.process.wait()
            raise UserError(
                f"data: a process that tokenises rows ended early (exit status {code}). If the machine is out of "
                "memory, lower `data.workers`."
            ) from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _send(self, content: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(content)
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # `encode` reports the process that has ended


def main(source: BinaryIO, sink: BinaryIO) -> None:
    """Encode the chunks that arrive until the parent closes the pipe or ends."""
    job: Job = pickle.load(source)
    writer = job.writer()
    while True:
        try:
            number, chunk, selected = pickle.load(source)
        except EOFError:
            return
        answer: int | str
        try:
            answer = writer.write(number, chunk, selected)
        except UserError as error:
            answer = str(error)
        pickle.dump(answer, sink)
        sink.flush()


if __name__ == "__main__":
    # What libraries print goes to the standard error, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    main(sys.stdin.buffer, answers)
