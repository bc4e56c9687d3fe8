"""Tables of plain text."""

from coatrt.system.text_table import aligned


def test_cells_stand_below_each_other_and_lines_end_with_their_text() -> None:
    rows = [("id", "GB/s", "formats"), ("rtx-4090", "1008", ""), ("l4", "?", "fp16 int8")]
    assert aligned(rows, "<><").split("\n") == [
        "id        GB/s  formats",
        "rtx-4090  1008",
        "l4           ?  fp16 int8",
    ]
