"""The report: everything given stands in it, whatever it is made of, and every picture it shows exists."""

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.models.keys import sd as keys
from lorasmith.report import ReportContents, norms_by_block, smooth, write_report

NASTY = "<script>alert(\"1\")</script> & 'quoted' <b>größer</b>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would find: tags, visible texts, places that are linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


def contents(**changed: object) -> ReportContents:
    values: dict[str, object] = {
        "title": "my LoRA",
        "summary": ["4 steps on 3 pictures."],
        "settings": {"network": {"rank": 4, "alpha": None}, "training": {"steps": 4, "seed": 42}},
        "losses": [(1, 0.5), (2, 0.25), (3, 0.75), (4, 0.125)],
        "norms": dict.fromkeys(keys.unet_targets(), 0.5) | dict.fromkeys(keys.text_targets("sd1"), 0.25),
        "files": [("last.safetensors", "the LoRA")],
    }
    return ReportContents(**{**values, **changed})  # type: ignore[arg-type]


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (160, 160), (0, 80, 20 * number)) for number in range(count)]


def test_every_text_given_stands_in_the_page(tmp_path: Path) -> None:
    given = contents()
    page = Page(write_report(tmp_path / "report", given))
    options = [text for section in given.settings.values() for pair in section.items() for text in pair]
    wanted = [given.title, *given.summary, *given.settings, *options, *[text for pair in given.files for text in pair]]
    assert [str(text) for text in wanted if str(text) not in page.texts] == []


def test_what_a_user_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    plain = Page(write_report(tmp_path / "plain", contents()))
    nasty = contents(
        title=NASTY,
        summary=[NASTY],
        settings={NASTY: {"rank": NASTY, NASTY: 4}, "training": {"prompts": [NASTY], "seed": 42}},
        files=[(NASTY, NASTY)],
    )
    page = Page(write_report(tmp_path / "nasty", nasty))
    assert page.tags == plain.tags
    assert page.texts.count(NASTY) == 8 and str([NASTY]) in page.texts


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize("num_after", [0, 2])
def test_every_picture_shown_exists_and_opens(tmp_path: Path, num_before: int, num_after: int) -> None:
    given = contents(prompts=["one", NASTY][:num_after], before=pictures(num_before), after=pictures(num_after))
    page = Page(write_report(tmp_path, given))
    assert page.links == [*(["samples.png"] if num_after else []), "loss.png", "norms.png"]
    for link in page.links:
        with Image.open(tmp_path / link) as picture:
            picture.load()
            assert min(picture.size) > 100


def test_samples_show_before_and_after(tmp_path: Path) -> None:
    write_report(tmp_path / "after", contents(prompts=["one"], after=pictures(1)))
    write_report(tmp_path / "both", contents(prompts=["one"], before=pictures(1), after=pictures(1)))
    after, both = (Image.open(tmp_path / name / "samples.png") for name in ("after", "both"))
    assert both.width == after.width and both.height >= after.height + 160


@pytest.mark.parametrize("losses", [[], [(1, 0.5)], [(1, 0.0)] * 3])
def test_few_losses_are_drawn_too(tmp_path: Path, losses: list[tuple[int, float]]) -> None:
    write_report(tmp_path, contents(losses=losses))
    assert Image.open(tmp_path / "loss.png").size == Image.open(tmp_path / "norms.png").size


def test_the_curve_shows_the_losses(tmp_path: Path) -> None:
    def curve(losses: list[tuple[int, float]]) -> bytes:
        write_report(tmp_path, contents(losses=losses))
        return Image.open(tmp_path / "loss.png").tobytes()

    one = curve([(step, 0.1) for step in range(20)])
    assert one == curve([(step, 0.1) for step in range(20)])
    assert one != curve([(step, 0.1 * step) for step in range(20)])


def test_each_learning_rate_is_a_curve(tmp_path: Path) -> None:
    rates = {"text encoder: 0.0001": [(1, 0.0001), (2, 5e-5)], "U-Net: 0.001": [(1, 0.001), (2, 5e-4)]}
    page = Page(write_report(tmp_path / "with", contents(rates=rates)))
    assert page.links == ["loss.png", "rates.svg", "norms.png"]
    drawing = (tmp_path / "with" / "rates.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(drawing).tag.endswith("svg") and all(name in drawing for name in rates)
    first, second = (re.findall(r'<path d="M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)\s+" clip-path', drawing))[-2:]
    falls = [float(y_2) - float(y_1) for _, y_1, _, y_2 in (first, second)]
    assert falls[1] == pytest.approx(10 * falls[0], rel=1e-3) and falls[0] > 0  # y points down
    write_report(tmp_path / "without", contents())
    assert not (tmp_path / "without" / "rates.svg").exists()


def test_a_report_is_written_anew_in_its_place(tmp_path: Path) -> None:
    write_report(tmp_path, contents(title="the first"))
    page = write_report(tmp_path, contents(title="the second"))
    assert "the first" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("family", "num_text"), [("sd1", 12), ("sd2", 23)])
def test_blocks_hold_every_module_once_in_the_order_of_the_model(family: str, num_text: int) -> None:
    names = [*keys.unet_targets(), *keys.text_targets(family)]  # type: ignore[arg-type]
    random.Random(0).shuffle(names)
    norms = {name: random.Random(name).random() for name in names}
    blocks = norms_by_block(norms)
    assert list(blocks) == [
        *(f"text {number}" for number in range(num_text)),
        *(f"down {level}.{place}" for level in range(3) for place in range(2)),
        "mid",
        *(f"up {level}.{place}" for level in range(1, 4) for place in range(3)),
    ]
    assert sum(norm**2 for norm in blocks.values()) == pytest.approx(sum(norm**2 for norm in norms.values()))
    third = [norm for name, norm in norms.items() if "_encoder_layers_3_" in name]
    assert blocks["text 3"] ** 2 == pytest.approx(sum(norm**2 for norm in third))


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("unet_down_blocks_0_resnets_1_conv1", "down 0.1"), ("unet_down_blocks_0_downsamplers_0_conv", "down 0.2"),
        ("unet_up_blocks_0_resnets_2_time_emb_proj", "up 0.2"), ("unet_up_blocks_0_upsamplers_0_conv", "up 0.2"),
        ("unet_mid_block_resnets_0_conv2", "mid"), ("unet_conv_in", "others"), ("unet_time_embedding", "others"),
        ("te_text_model_embeddings_token_embedding", "others"), ("unet_input_blocks_1_1_proj_in", "others"),
        (f"te_text_model_encoder_layers_{'9' * 5000}_mlp_fc1", "others"),
    ],
)  # fmt: skip
def test_layers_beside_the_attentions_have_a_place_too(module: str, block: str) -> None:
    norms = {f"lora_{module}": 3.0, "lora_unet_mid_block_attentions_0_proj_in": 4.0}
    assert norms_by_block(norms) == ({"mid": 5.0} if block == "mid" else {"mid": 4.0, block: 3.0})


def test_every_layer_that_an_adapter_can_go_on_is_in_the_picture(tmp_path: Path) -> None:
    write_report(tmp_path, contents(norms=dict.fromkeys(keys.adapter_modules(), 0.5)))
    assert (tmp_path / "norms.png").exists()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.sampled_from([0.0, 0.5, 0.95]))
def test_smoothing_is_the_weighted_mean_of_what_came_before(values: list[float], weight: float) -> None:
    for count, smoothed in enumerate(smooth(values, weight), 1):
        weights = [weight ** (count - 1 - i) for i in range(count)]
        mean = sum(w * value for w, value in zip(weights, values, strict=False)) / sum(weights)
        assert smoothed == pytest.approx(mean, abs=1e-6)
    assert len(smooth(values, weight)) == len(values)


def test_held_out_pictures_are_listed_by_how_far_their_loss_rose(tmp_path: Path) -> None:
    pictures = {
        "falls.png": [(0, 0.5), (4, 0.2)],
        "_rises $much$.png": [(0, 0.5), (2, 0.1), (4, 0.6)],
        "rises <b>.png": [(0, 0.5), (2, 0.3), (4, 0.4)],
    }
    page = Page(write_report(tmp_path, contents(pictures=pictures)))
    assert [text for text in page.texts if text in pictures] == ["_rises $much$.png", "rises <b>.png", "falls.png"]
    assert "0.5000 at first, lowest 0.1000 after step 2, 0.6000 at last" in page.texts
    Image.open(tmp_path / "held-out.png").verify()


def test_a_network_of_unknown_tensors_has_no_norms(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, contents(norms={})))
    assert "What was learned where" not in page.texts and "norms.png" not in page.links
    assert not (tmp_path / "norms.png").exists() and "Settings" in page.texts
