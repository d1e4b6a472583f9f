"""Tells the name of a file of this machine from that of a repository on the Hub."""

from pathlib import PurePath


_FILE_SUFFIXES = frozenset(
    (".arrow", ".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tar", ".tsv", ".txt", ".xlsx", ".yaml", ".yml")
    + (".parq", ".pq")
    + (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
    + (".7z", ".bz2", ".gz", ".lz4", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst")
)


def ends_like_a_file(name: str) -> bool:
    """Whether a name has the suffix of a data file, of weights or of an archive: it is then never asked at the Hub."""
    return PurePath(name).suffix.lower() in _FILE_SUFFIXES
