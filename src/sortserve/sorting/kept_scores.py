"""Task scores in a file as they come, so that a measuring that was interrupted goes on where it was.

The file is beside the ladder that will be written and goes away with it. A score is taken up again if weights, dtype,
version, questions and sub-models are the same; ids of entries may have changed meanwhile.
"""

import hashlib
from pathlib import Path

import msgspec

import sortserve
from sortserve.engine.ladder import Entry
from sortserve.engine.ladder_file import Score
from sortserve.engine.llm import LLM
from sortserve.sorting.answers import Progress, Task, score
from sortserve.sorting.folder import new_file


class _File(msgspec.Struct):
    of: list[tuple[str, str]]  # what all scores have in common
    scores: dict[str, Score]


class KeptScores:
    """Scores that are known. A file that is damaged, or of other weights, is as good as none."""

    def __init__(self, path: Path | None, model: Path, dtype: str) -> None:
        """`path` None: nothing is kept."""
        self._path = path
        self._of = [("version", sortserve.__version__), ("dtype", dtype)]
        for file in sorted(model.glob("*.safetensors")):
            self._of.append((file.name, f"{file.stat().st_size} {file.stat().st_mtime_ns}"))
        self._scores: dict[str, Score] = {}
        if path is not None and path.is_file():
            try:
                found = msgspec.json.decode(path.read_bytes(), type=_File)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return
            self._scores = found.scores if found.of == self._of else {}

    def score(self, llm: LLM, prompt: Entry, answer: Entry, task: Task, progress: Progress | None = None) -> Score:
        """`answers.score` of two entries (or one, twice), or what it was before the interruption."""
        content = f"{task.digest} {prompt.submodel!r} {answer.submodel!r}"
        key = f"{task.name} {hashlib.sha256(content.encode()).hexdigest()}"
        if key in self._scores:
            return self._scores[key]
        found = self._scores[key] = score(llm, prompt.id, answer.id, task, progress)
        if self._path is not None:
            with new_file(self._path) as path:
                path.write_bytes(msgspec.json.format(msgspec.json.encode(_File(self._of, self._scores))) + b"\n")
        return found
