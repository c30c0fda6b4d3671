"""Opens an image dataset: the embedded digits, a local folder or parquet file, or an id on the Hub."""

from glob import has_magic
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from hf_prune.data.digits import load_digits_dataset
from hf_prune.errors import DataError

Split = Dataset | IterableDataset

EMBEDDED = "digits"


def open_source(
    source: str | Path, *, config_name: str | None, streaming: bool, cache_dir: str | Path | None
) -> dict[str, Split]:
    """Open every split of a dataset without decoding an image.

    Args:
        source: "digits", a folder, a parquet file or glob, or a Hub id. A folder of your own that is
            called digits is reached as "./digits".
        config_name: Configuration, for datasets that have several.
        streaming: Read rows while iterating rather than building an Arrow file first.
        cache_dir: Where `datasets` keeps downloads and Arrow files; its own default if None.

    Returns:
        Split name -> rows, under the names that the dataset uses.

    Raises:
        DataError: If the dataset does not exist, cannot be reached or cannot be read.
    """
    source = str(source)
    if source == EMBEDDED:
        digits = load_digits_dataset()
        return {str(name): rows.to_iterable_dataset() if streaming else rows for name, rows in digits.items()}
    try:
        if not Path(source).is_dir() and (source.endswith(".parquet") or has_magic(source)):
            opened = load_dataset(
                "parquet", config_name, data_files=source, streaming=streaming, cache_dir=_text(cache_dir)
            )
        else:
            opened = load_dataset(source, config_name, streaming=streaming, cache_dir=_text(cache_dir))
    except Exception as err:  # datasets, huggingface_hub, fsspec and pyarrow each raise their own kinds
        raise DataError(
            f"`source` must be 'digits', a folder, a parquet file or a dataset on the Hub, got '{source}' "
            f"which could not be opened: {_reason(err)}; check the spelling, `config_name` and the network"
        ) from err
    return {str(name): rows for name, rows in opened.items()}


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _reason(err: BaseException) -> str:
    # The outer error often says no more than "an error occurred while generating the dataset".
    while err.__cause__ is not None:
        err = err.__cause__
    return f"{type(err).__name__}: {str(err).strip()}"
