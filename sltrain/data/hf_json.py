"""JSON files in a data set that `datasets` opens, reduced to the column that is read.

`datasets` expects every part of every file to have the columns and types of the first: another key, or a null that
becomes a string later, would end the reading of a file whose text is sound. And where the values of a column are of
mixed kinds, it encodes all of them as JSON, so that a single number among the texts of a part of 10 MB would put the
others between quotation marks. Here the other columns are dropped before anything is compared, and what is no string is
null: a bad record, alone.
"""

import json
from collections.abc import Iterator
from typing import Any


def keep_column(builder: Any, column: str) -> None:
    """Let a JSON builder of `datasets` give tables of this column only, of strings and nulls. Its streaming data set
    is made after this, and then `forget_features` is called."""
    generate = builder._generate_tables

    def of_column(*args: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
        for key, table in generate(*args, **options):
            yield key, _column_alone(table, column)

    builder._generate_tables = of_column


def forget_features(builder: Any) -> None:
    """Let the builder of an open data set, which keeps a copy of them, read files of any columns."""
    builder.info.features = None


def _column_alone(table: Any, column: str) -> Any:
    import pyarrow
    from pyarrow import types

    if column not in table.column_names:
        texts = pyarrow.nulls(len(table), pyarrow.string())
    elif types.is_string(table[column].type) or types.is_large_string(table[column].type):
        texts = table[column].cast(pyarrow.string())
    elif isinstance(table[column].type, getattr(pyarrow, "JsonType", ())):  # values of mixed kinds
        values = (None if value is None else json.loads(value) for value in table[column].to_pylist())
        texts = pyarrow.array([value if isinstance(value, str) else None for value in values], pyarrow.string())
    else:
        texts = pyarrow.nulls(len(table), pyarrow.string())
    return pyarrow.table({column: texts})
