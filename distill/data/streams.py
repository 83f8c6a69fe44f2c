"""Records of a dataset read as a stream (`datasets`, streaming=True), with a state that resumes exactly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..digest import files_fingerprint
from ..errors import MachineError, UserError
from .documents import Document, Fields, record_document

_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


class RecordStream:
    """The documents of one dataset, in the dataset's own order, epoch after epoch.

    Args:
        source: dataset name for `datasets.load_dataset`, for messages too.
        fields: where a record's document is.
        name: configuration of the dataset.
        split: its split.
        files: local jsonl or parquet files to stream instead of a named dataset.

    Raises:
        UserError: no such dataset, configuration or split; files of a kind that cannot be streamed; while reading, a
            file that changed since.
        MachineError: the dataset cannot be reached.
    """

    def __init__(
        self,
        source: str,
        fields: Fields,
        *,
        name: str | None = None,
        split: str = "train",
        files: Sequence[Path] | None = None,
    ) -> None:
        self.source = source
        self.fields = fields
        self.files = list(files or [])
        self._opened = _stats(source, self.files)
        self.dataset = _open_files(source, files) if files else load_stream(source, source, name=name, split=split)
        self._beginning = copy.deepcopy(self.dataset.state_dict())
        self._records: Any = None
        self._number = 0
        self.exhausted = False

    def read(self, count: int) -> list[Document]:
        """The next documents of up to `count` records; fewer records only at the end of an epoch.

        The list may be shorter than `count` because blank documents are left out: `exhausted` tells the end.
        """
        if self._records is None:
            self._records = iter(self.dataset)
        self._check_unchanged()
        found = []
        taken = 0
        for record in reading(self.source, islice(self._records, count)):
            taken += 1
            self._number += 1
            if document := record_document(record, self.fields, f"{self.source}, record {self._number}"):
                found.append(document)
        self.exhausted = taken < count
        self._check_unchanged()
        return found

    def fingerprint(self) -> str | None:
        """What local files hold (`digest.files_fingerprint`); None of a named dataset."""
        return files_fingerprint(self.files) if self.files else None

    def _check_unchanged(self) -> None:
        """Records are read when they are needed: what was written in between would be half of one, half of another."""
        for path, before, now in zip(self.files, self._opened, _stats(self.source, self.files), strict=True):
            if before != now:
                raise UserError(
                    f"{path}: changed while the run was reading it ({before[0]:,} bytes when it was opened, now "
                    f"{now[0]:,}). What was saved is from before: put the file back and go on with --resume, or start "
                    "anew with the new one in another folder: --out DIR"
                )

    def rewind(self) -> None:
        """Back to the first record."""
        self.load_state_dict({"dataset": self._beginning, "number": 0, "exhausted": False})

    def state_dict(self) -> dict[str, Any]:
        """The place after the last record read; JSON-serialisable."""
        state = copy.deepcopy(self.dataset.state_dict())
        return {"dataset": state, "number": self._number, "exhausted": self.exhausted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the record where `state` was taken."""
        self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._records = None
        self._number = state["number"]
        self.exhausted = state["exhausted"]


def _stats(source: str, files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Size, time and number of each file."""
    found = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(
                f"{path}: gone or unreadable ({error.strerror}); {source} is read from it. Put it back"
            ) from (None)
        found.append((stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return found


def reading(source: str, records: Any) -> Any:
    """Records of a dataset, with its errors in our words; see `RecordStream`."""
    from datasets.exceptions import DatasetsError

    try:
        yield from records
    except (DatasetsError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise UserError(
            f"{source}: the dataset cannot be read ({_first_line(error)}); expected valid records; correct or remove it"
        ) from None
    except (OSError, ConnectionError) as error:
        raise MachineError(
            f"{source}: reading the stream failed ({_first_line(error)}); check the network, then go on with --resume"
        ) from None


def _open_files(source: str, files: Sequence[Path]) -> Any:
    kinds = sorted({_BUILDERS.get(path.suffix.lower(), "") for path in files})
    if len(kinds) != 1 or not kinds[0]:
        raise UserError(
            f"{source}: found {', '.join(path.name for path in files[:5])}; to stream, expected only .jsonl or only "
            ".parquet files; set data.stream=false, or convert the text to jsonl"
        )
    return load_stream(source, kinds[0], data_files=[str(path) for path in files], split="train")


def load_stream(source: str, path: str, **options: Any) -> Any:
    """A dataset of `datasets` as a stream; `source` is what errors call it.

    Raises:
        UserError: there is none like it.
        MachineError: it cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        return load_dataset(path, streaming=True, **options)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{source}: neither a local file or folder nor a dataset that can be found ({_first_line(error)}); "
            "set data.source to a path or to the name of a dataset (a gated one needs: hf auth login)"
        ) from None
    except (OSError, ConnectionError) as error:
        raise MachineError(
            f"{source}: no such local file or folder, and no such dataset can be reached ({_first_line(error)}); "
            "set data.source to a local path, or check the network"
        ) from None
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"{source}: the dataset cannot be opened ({_first_line(error)}); expected an existing configuration "
            "(data.name) and split (data.split)"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
