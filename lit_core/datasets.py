"""Rows from Hugging Face datasets: a hub id, a local folder or a data file; whole or as a stream."""

from pathlib import Path
from typing import Any

from lit_core.errors import InputError

FILE_TYPES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


def load_rows(name_or_path: str, config: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """Open a dataset as ``datasets`` does; scripts are never run.

    Args:
        name_or_path: Hub id, local folder, or a data file (parquet, csv, arrow, json).
        config: Configuration of the dataset, where it has several.
        split: Name of the split.
        streaming: Read rows as they are asked for instead of downloading and caching them all.

    Raises:
        InputError: There is no such dataset, configuration or split.
    """
    import datasets

    kind = FILE_TYPES.get(Path(name_or_path).suffix) if Path(name_or_path).is_file() else None
    try:
        if kind:
            options = {"sep": "\t"} if name_or_path.endswith(".tsv") else {}
            return datasets.load_dataset(kind, data_files=name_or_path, split=split, streaming=streaming, **options)
        return datasets.load_dataset(name_or_path, config, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"no such file or folder, and no Hugging Face dataset could be loaded (config {config}, split {split}): "
            f"{error}",
            name_or_path,
        ) from None
