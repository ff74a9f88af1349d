"""The page of a grid: a table whose headings are those of each picture, readable without a script, from this folder."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from lorasmith import grids
from lorasmith.grid_page import Shown, grid_page
from lorasmith.grids import Cell, Label

EVIL = "<b>&\"'</script><script>alert(1)</script> 猫"


class Page(HTMLParser):
    """All elements with their attributes; the text of headings; each table as rows of (tag, attributes, text, link)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.tables: list[list[list[dict[str, Any]]]] = []
        self._cell: dict[str, Any] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts: dict[str, Any] = dict(attrs)
        self.elements.append((tag, facts))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = {"tag": tag, "text": "", "link": None, "alt": None, **facts}
            self.tables[-1][-1].append(self._cell)
        elif tag == "a" and self._cell is not None:
            self._cell["link"], self._cell["base"] = facts["href"], facts.get("data-base")
        elif tag == "img" and self._cell is not None:
            self._cell["alt"], self._cell["src"] = facts["alt"], facts["src"]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell["text"] += data


def laid_out(rows: list[list[dict[str, Any]]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Lay a table out as a browser does (HTML, 4.9.12), and check that no two of its cells overlap."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for y, row in enumerate(rows):
        x = 0
        for cell in row:
            while (x, y) in found:
                x += 1
            for right in range(int(cell.get("colspan") or 1)):
                for down in range(int(cell.get("rowspan") or 1)):
                    assert (x + right, y + down) not in found
                    found[x + right, y + down] = cell
    return found


def names() -> dict[str, list[Label]]:
    texts = {
        "prompt": ["a cat", EVIL], "seed": ["seed 1", "seed 2"], "lora": ["robot", EVIL], "strength": ["0.5", "1"]
    }  # fmt: skip
    return {axis: [Label(text, text) for text in own] for axis, own in texts.items()}


def shown(cell: Cell, prefix: str = "") -> Shown:
    return Shown(f"cells/{prefix}{'-'.join(map(str, vars(cell).values()))} #%ü.png", (64, 48), f"{cell} {EVIL}")


def page_of(columns: str = "", rows: str = "", apart: str = "") -> tuple[Page, list[grids.Sheet], str]:
    sides = grids.sides(columns.split(), rows.split(), apart.split())
    sheets = grids.sheets(sides, names(), has_base=True)
    pictures = {one: shown(one) for sheet in sheets for row in sheet.cells for one in row}
    text = grid_page(EVIL, ["facts & " + EVIL], sheets, pictures)
    return Page(text), sheets, text


@pytest.mark.parametrize(
    "columns, rows, apart",
    [("", "", ""), ("lora", "strength", ""), ("", "prompt lora strength", ""), ("", "", "lora"),
     ("prompt seed lora strength", "", ""), ("", "prompt seed lora strength", "")],
)  # fmt: skip
def test_each_picture_stands_under_its_headings(columns: str, rows: str, apart: str) -> None:
    page, sheets, _ = page_of(columns, rows, apart)
    assert len(page.tables) == len(sheets)
    for table, sheet in zip(page.tables, sheets, strict=True):
        grid = laid_out(table)
        width, height = 1 + max(x for x, _ in grid), 1 + max(y for _, y in grid)
        assert len(grid) == width * height, "there is a hole"
        across, down = len(sheet.rows[0]), len(sheet.columns[0])
        for i, row in enumerate(sheet.cells):
            for j, one in enumerate(row):
                cell = grid[across + j, down + i]
                assert cell["link"] == cell["src"] and cell["tag"] == "td" and str(one) in cell["alt"]
                assert (cell["base"] is None) == (one.lora is None)
                over = [grid[across + j, y]["text"] for y in range(down)]
                before = [grid[x, down + i]["text"] for x in range(across)]
                for said, heading in ((over, sheet.columns[j]), (before, sheet.rows[i])):
                    wanted = [label.text for label in heading]
                    assert said == [text or wanted[k - 1] for k, text in enumerate(wanted)]
        for head in (cell for row in table for cell in row if cell["tag"] == "th"):
            is_group = (
                int(head.get("colspan") or 1) > 1 if "col" in head["scope"] else int(head.get("rowspan") or 1) > 1
            )
            assert head["scope"].endswith("group") or not is_group


def test_what_is_written_is_text_and_files_are_beside_the_page() -> None:
    page, _, text = page_of()
    assert text.count("<script>") == 1 and "<b>" not in text and text.count("</script>") == 1
    links = [facts[key] for _, facts in page.elements for key in ("href", "src", "data-base") if facts.get(key)]
    assert links and all(re.fullmatch(r"cells/[\w%.-]+\.png|#sheet-\d+", link) for link in links), links[:3]
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert [facts for tag, facts in page.elements if tag == "html"] == [{"lang": "en"}]
    assert all(facts.get("alt") is not None for tag, facts in page.elements if tag == "img")
    closed = re.findall(r"<(/?)(table|tr|td|th|section|dialog|div|a|p|thead|tbody)\b", text.split("</style>")[1])
    for name in {name for _, name in closed}:
        assert closed.count(("", name)) == closed.count(("/", name)), name


def test_several_sheets_have_a_list() -> None:
    page, sheets, _ = page_of("lora", "strength")
    ids = {facts["id"] for tag, facts in page.elements if tag == "section"}
    assert (
        len(sheets) == 4
        and {facts["href"][1:] for tag, facts in page.elements if tag == "a" and "#" in facts["href"][:1]} == ids
    )


def test_both_pictures_of_the_view_lie_on_one_another() -> None:
    _, _, text = page_of(columns="lora", rows="prompt")
    style = re.sub(r"@media[^{]*\{.*?\}\s*\}", "", re.findall(r"<style>(.*?)</style>", text, re.S)[0], flags=re.S)
    found = []
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        for selector in map(str.strip, selectors.split(",")):
            display = re.search(r"display: (\w+)", body)
            if display and selector in ("div", "#stage", "#view > div", "#view > #stage"):  # all that mean the stage
                found.append((selector.count("#"), len(re.findall(r"\bdiv\b", selector)), len(found), display[1]))
    assert len(found) > 1
    assert max(found)[-1] == "grid", "another rule makes rows of the two pictures, one below the other"
