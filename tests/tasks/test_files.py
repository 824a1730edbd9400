from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from deltatune.errors import DataError, InvalidValue, Noticed
from deltatune.tasks import Rows, task_from_file

GOOD = [
    {"text": f"review number {index}, all in all {'fine' if index % 2 else 'bad'}", "label": "yes" if index % 2 else "no"}
    for index in range(30)
]


def write_csv(file: Path, rows: list[dict[str, object]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    file.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return file.with_suffix(".csv")


def write_tsv(file: Path, rows: list[dict[str, object]]) -> Path:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    file.with_suffix(".tsv").write_text("\n".join(lines))
    return file.with_suffix(".tsv")


def write_jsonl(file: Path, rows: list[dict[str, object]]) -> Path:
    file.with_suffix(".jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return file.with_suffix(".jsonl")


def write_parquet(file: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


@pytest.mark.parametrize("write", [write_csv, write_tsv, write_jsonl, write_parquet])
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[[Path, list[dict[str, object]]], Path]) -> None:
    data = task_from_file(write(tmp_path / "reviews", GOOD))
    assert data.task.labels == ("no", "yes")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 20, "validation": 4, "test": 6}
    assert {(row["text"], data.task.labels[row["label"]]) for rows in data.splits.values() for row in rows} == {
        tuple(row.values()) for row in GOOD
    }
    assert data.fingerprint == task_from_file(write_csv(tmp_path / "again", GOOD)).fingerprint


def test_the_fingerprint_sees_one_changed_letter(tmp_path: Path) -> None:
    changed = [{**GOOD[0], "text": GOOD[0]["text"].upper()}, *GOOD[1:]]
    assert task_from_file(write_csv(tmp_path / "a", GOOD)).fingerprint != task_from_file(write_csv(tmp_path / "b", changed)).fingerprint


def test_rows_that_are_left_out_are_told(tmp_path: Path) -> None:
    twice = [*GOOD, GOOD[3], {**GOOD[4], "label": "yes"}]
    with pytest.warns(Noticed, match="`reviews.jsonl`: 1 duplicates left out, 2 contradictions left out"):
        data = task_from_file(write_jsonl(tmp_path / "reviews", twice))
    assert sum(map(len, data.splits.values())) == 29


def test_pairs_numbers_and_texts(tmp_path: Path) -> None:
    rows = [{"question": f"q {index}", "answer": f"a {index}", "stars": index / 2} for index in range(30)]
    file = write_jsonl(tmp_path / "answers", rows)
    regression = task_from_file(file, text=["question", "answer"], label="stars", type="regression")
    assert regression.task.metric == "pearson" and regression.task.outputs == 1
    assert all(isinstance(value, float) for value in regression.train["stars"])
    generation = task_from_file(file, text="question", label="answer", type="text2text")
    assert generation.task.templates[0].render({"question": "why?"}) == "why?\nanswer:"
    assert str(generation.train["answer"][0]).startswith("a ")


def test_number_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"text {index}", "label": index % 11} for index in range(110)]
    assert task_from_file(write_parquet(tmp_path / "stars", rows)).task.labels == tuple(str(index) for index in range(11))


def test_a_byte_order_mark_and_blank_lines_are_fine(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "excel", GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert len(task_from_file(file).train) == 20


def broken(number: int, **fields: object) -> list[dict[str, object]]:
    return [{**row, **fields} if index == number else row for index, row in enumerate(GOOD)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            GOOD,
            {"text": "txt"},
            r"`txt` for the text: its columns are `text`, `label`. Did you mean `text`\? Name one by `text=COLUMN`",
        ),
        (GOOD, {"label": "lable"}, r"no column `lable` for the label:.*Did you mean `label`\? Name one by `label=COLUMN`"),
        (GOOD, {"text": "zzzzz"}, r"its columns are `text`, `label`. Name one by"),
        (broken(3, text="  "), {}, r"has no text in column `text` of row 4"),
        (broken(3, label=""), {}, r"has no label in column `label` of row 4"),
        ([{**row, "label": "yes"} for row in GOOD], {}, r"one class only, `yes`.*at least two"),
        ([{**row, "label": row["text"]} for row in GOOD], {}, r"30 different values.*type='regression'"),
        (GOOD, {"type": "regression"}, r"is a regression.*'(no|yes)', which is not a number"),
        (
            GOOD[:2],
            {},
            r"`validation` of `data` is empty \(2 rows were read\).* at least 3 different texts of a class; the largest class has 1",
        ),
        (
            [{**row, "label": index / 7} for index, row in enumerate(GOOD[:2])],
            {"type": "regression"},
            r"at least 3 different texts; there are 2. Add rows",
        ),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[dict[str, object]], options: dict[str, str], message: str) -> None:
    for write in (write_csv, write_jsonl):
        with pytest.raises(DataError, match=message):
            task_from_file(write(tmp_path / "data", rows), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"", r"`data.csv` is empty"),
        ("data.csv", b"text,label\n", r"has no rows"),
        ("data.csv", b"text,label\nfine,yes\ncaf\xe9,no\n", r"`data.csv` is not UTF-8: line 3 holds the byte 0xe9.*iconv"),
        ("data.csv", b"text,label\nfine, well,yes\n", r"line 2 has 3 cells, the header has 2 \(`text`, `label`\)"),
        ("data.jsonl", b'{"text": "a", "label": 1}\n{"text": ', r"`data.jsonl` line 2 is not JSON"),
        ("data.jsonl", b"[1]\n", r"line 1 is not a JSON object"),
        ("data.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', r"has no label in column `label` of row 2"),
        ("data.parquet", b"PAR1 no", r"`data.parquet` cannot be read as Parquet"),
        ("data.txt", b"hello", r"ends in `.txt`. Known: .csv, .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        task_from_file(tmp_path / name)


def test_no_file_and_no_share(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        task_from_file(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="is a folder"):
        task_from_file(tmp_path)
    with pytest.raises(InvalidValue, match="leave nothing to train on"):
        task_from_file(write_csv(tmp_path / "data", GOOD), test=1.0)


def test_rows_can_be_used_at_once(tmp_path: Path) -> None:
    assert isinstance(task_from_file(write_csv(tmp_path / "data", GOOD)).train, Rows)
