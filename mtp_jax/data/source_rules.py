"""What the keys of a source must be beside one another; the kind of the source decides."""

from typing import Any

# What a row of a dataset may be, best first, and our names of the columns that it takes.
FORMS = {"conversation": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
_OURS = tuple(name for names in FORMS.values() for name in names)
# How data files end, and what the `datasets` library calls their format.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def source_faults(source: Any, key: str) -> list[str]:
    """Contradictions within a source of the config; `key` is its place there."""
    faults = []
    if source.kind == "text" and source.path is None:
        faults.append(f"{key}.path is missing; a text source reads a file, a folder or a glob.")
    if source.kind == "python-stdlib" and (source.path is not None or source.separator is not None):
        faults.append(f"{key}: python-stdlib is the library of the running Python and takes no path or separator.")
    if source.kind == "dataset":
        return faults + _dataset_faults(source, key)
    for name in (name for name in ("name", "split") if getattr(source, name) is not None):
        faults.append(f"{key}.{name} belongs to a dataset source, and this one is {source.kind}.")
    if source.streaming:
        faults.append(f"{key}.streaming belongs to a dataset source; a {source.kind} source is read piece by piece.")
    if source.columns:
        faults.append(f"{key}.columns: a {source.kind} source has no columns.")
    if source.separator == "":
        faults.append(f"{key}.separator is empty; leave it out where a file is one document.")
    return faults


def _dataset_faults(source: Any, key: str) -> list[str]:
    faults = []
    if (source.name is None) == (source.path is None):
        faults.append(
            f"{key}: a dataset source takes exactly one of name (of the Hugging Face hub) and path (files that end in "
            f"{', '.join(FORMATS)}, a glob of them, or a folder)."
        )
    if source.separator is not None:
        faults.append(f"{key}.separator: the rows of a dataset are its documents, and nothing parts them.")
    if source.streaming and "[" in (source.split or ""):
        faults.append(f"{key}.split: a part of a split cannot be streamed; name a whole split.")
    for ours in sorted(set(source.columns) - set(_OURS)):
        faults.append(f"{key}.columns.{ours} is not one of our columns, which are {', '.join(_OURS)}.")
    if len(forms := chosen_forms(source.columns)) > 1:
        faults.append(f"{key}.columns: a row is one of {' or '.join(forms)}; name the columns of one alone.")
    return faults


def chosen_forms(columns: dict[str, str]) -> list[str]:
    """The forms whose columns a source names."""
    return [form for form, names in FORMS.items() if set(names) & set(columns)]
