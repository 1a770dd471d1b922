"""Problems of a Hugging Face data set: a hub id, a folder of files or a folder of `save_to_disk`.

Used by `rlt stage=teacher_rl data=hub data.source.path=openai/gsm8k data.source.name=main
data.source.columns.solution=answer data.source.solution_mark='####'`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from rlt.config.suggestions import did_you_mean
from rlt.data.problem import content_hash
from rlt.data.row_checks import check_columns, map_columns
from rlt.data.rows import MISSING_TAGS, RawRow, RowError, excerpt
from rlt.data.sources.files import missing_path


class HubDataset:
    """A source of problems in a data set with one column for each field.

    Args:
        path: hub id, or a local folder.
        split: name of the split.
        columns: column of each field (question, solution, explanation, system); None if there is
            no such column.
        name: configuration of the data set on the hub, if it has several.
        revision: branch, tag or commit on the hub; None is the newest.
        solution_mark: the mark between worked explanation and answer, if the solution column holds
            both (in gsm8k it is `####`). None if the column holds the answer alone.

    Raises:
        ValueError: a field is unknown, question or solution has no column, or `solution_mark` is
            set together with a column of explanations.
    """

    def __init__(
        self,
        path: str,
        split: str,
        columns: Mapping[str, str | None],
        name: str | None = None,
        revision: str | None = None,
        solution_mark: str | None = None,
    ) -> None:
        self.columns = check_columns(columns)
        if solution_mark is not None and "explanation" in self.columns:
            raise ValueError(
                f"data.source.solution_mark={solution_mark!r} takes the explanation from the "
                "solution column; set data.source.columns.explanation=null"
            )
        self.table = HubTable(path, split, name, revision)
        self.solution_mark = solution_mark

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows. Raises the errors of `HubTable.load`."""
        for raw in self.table.rows(list(self.columns.values())):
            yield self._split_solution(map_columns(raw, self.columns, optional_may_lack=False))

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data, including a `fingerprint`, for the manifest."""
        how = json.dumps([self.columns, self.solution_mark], sort_keys=True)
        about = self.table.describe()
        fingerprint = content_hash(about["fingerprint"], how)
        return {
            "kind": "HubDataset",
            **about,
            "columns": self.columns,
            "fingerprint": fingerprint,
        }

    def _split_solution(self, raw: RawRow) -> RawRow:
        text = raw.values.get("solution")
        if self.solution_mark is None or not isinstance(text, str):
            return raw
        worked, mark, answer = text.rpartition(self.solution_mark)
        if not mark:
            fault = RowError(MISSING_TAGS, f"no {self.solution_mark!r} in {excerpt(text)}")
            return RawRow(raw.file, raw.row, {}, fault)
        values = {**raw.values, "solution": answer.strip(), "explanation": worked.strip()}
        return RawRow(raw.file, raw.row, values)


class HubTable:
    """One split of a data set. It is loaded at the first use.

    Args:
        path: hub id, or a local folder.
        split: name of the split.
        name: configuration of the data set on the hub, if it has several.
        revision: branch, tag or commit on the hub; None is the newest.
    """

    def __init__(self, path: str, split: str, name: str | None, revision: str | None) -> None:
        self.path = path
        self.split = split
        self.name = name
        self.revision = revision
        self._loaded: datasets.Dataset | None = None

    def rows(self, columns: list[str]) -> Iterator[RawRow]:
        """Yield all rows, with values by column name.

        Args:
            columns: the columns to read; all columns are read if the data set has none of them.
        """
        table = self.load()
        read_columns = [
            name for name in table.column_names if name in columns
        ] or table.column_names
        for number, values in enumerate(table.select_columns(read_columns), start=1):
            yield RawRow(f"{self.path}[{self.split}]", number, values)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data, including a `fingerprint`, for the manifest."""
        return {
            "path": self.path,
            "split": self.split,
            "name": self.name,
            "revision": self.revision,
            "fingerprint": self.load()._fingerprint,
        }

    def load(self) -> datasets.Dataset:
        """Load the split, or return it if it is loaded already.

        Raises:
            FileNotFoundError: `path` looks like a folder, but there is no such folder.
            ValueError: the folder has no such split, or the hub does not provide the data set.
        """
        if self._loaded is None:
            folder = Path(self.path).expanduser()
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                self._loaded = self._from_disk(folder)
            elif folder.is_dir():
                self._loaded = datasets.load_dataset(
                    str(folder), self.name, split=self.split, revision=self.revision
                )
            elif self.path.startswith((".", "/", "~")) or self.path.count("/") > 1:
                raise FileNotFoundError(missing_path(folder))
            else:
                self._loaded = self._from_hub()
        return self._loaded

    def _from_disk(self, folder: Path) -> datasets.Dataset:
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.Dataset):
            if loaded.split is None or str(loaded.split) == self.split:
                return loaded
            splits = [str(loaded.split)]
        else:
            splits = [str(split) for split in loaded]
        if self.split not in splits:
            raise ValueError(
                f"data.source.split={self.split!r}: {folder} holds {', '.join(splits)}"
                f"{did_you_mean(self.split, splits)}"
            )
        return loaded[self.split]

    def _from_hub(self) -> datasets.Dataset:
        try:
            return datasets.load_dataset(
                self.path, self.name, split=self.split, revision=self.revision
            )
        except OSError as error:  # no such data set, no permission or no connection
            raise ValueError(
                f"data.source.path={self.path!r}: there is no such local folder, and the hub "
                f"does not provide it ({type(error).__name__}: {error}). Without a hub, copy the "
                "data set to this machine (`Dataset.save_to_disk`, or its files) and name "
                "that folder"
            ) from error
