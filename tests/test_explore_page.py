"""The page of `experiments.explore` in a real browser: typing, pointing, keys, two models, narrow and dark windows."""

import threading

import pytest

from experiments.exploring.held import HeldModel
from tests.chromium import Chromium, find_chromium
from tests.conftest import needs
from tests.test_shade import folders as folders

needs("explore", "starlette")
uvicorn = needs("explore", "uvicorn")

from experiments.explore import listening  # noqa: E402
from experiments.exploring.app import make_app  # noqa: E402
from experiments.exploring.guard import LOCAL  # noqa: E402

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")

READY = "document.querySelectorAll('article').length === 2 && !document.querySelector('article.stale')"
SHOWN = "[...document.querySelectorAll('pre.shown')].map((one) => one.textContent)"


@pytest.fixture(scope="module")
def address(folders):
    models = [HeldModel(str(folders / name)) for name in ("sfe", "bytes")]
    place = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(models, 64, LOCAL, None), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    yield f"http://127.0.0.1:{place.getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(str(find_chromium()), tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, address):
    """The page as it opens, with a short text; it must not have complained at the end."""
    browser.show_as()
    browser.open(address)
    browser.wait_for(READY)
    write(browser, "so it goes")
    yield browser
    assert browser.complaints() == []
    assert {one.partition("?")[0].rpartition("/")[0] for one in browser.addresses()} <= {
        address.rstrip("/"),
        f"{address}api",
        f"blob:{address.rstrip('/')}",
    }


def write(page, text):
    """Replace the text, and wait for both answers."""
    page.run("document.getElementById('text').select(); document.getElementById('text').focus()")
    page.type(text)
    page.wait_for(f"{READY} && document.getElementById('size').textContent.startsWith('{len(text.encode())} ')")


def detail(page):
    return page.run("document.getElementById('detail').innerText")


def test_boundaries_follow_what_is_typed_and_text_is_never_markup(page):
    hostile = "<img src=x onerror='document.title=1'>\n& שלום e\u0301"
    write(page, hostile)
    shown = page.run(SHOWN)
    assert shown == [hostile.replace("\n", "⏎\n")] * 2
    assert page.run("document.title") == "Where tokens end"
    assert page.run("document.querySelectorAll('pre.shown img').length") == 0
    # A sign with its accent is one, and shaded.
    assert page.run("document.querySelector('pre.shown .block').lastChild.textContent") == "e\u0301"
    assert page.run("document.querySelectorAll('article')[0].querySelectorAll('pre.shown [class*=p]').length") > 30
    assert page.run("document.querySelectorAll('article')[1].querySelectorAll('pre.shown .p10').length") == 0


def test_pointing_shows_what_every_model_says(page):
    page.point("pre.shown [data-n='4']")
    page.wait_for("document.getElementById('detail').innerText.includes('byte 4')")
    lines = [one for one in detail(page).splitlines() if one]
    assert lines[0].startswith("t")
    assert "sfe" in lines[1]
    assert "p 0." in lines[1]
    assert "bits" in lines[1]
    assert "token" in lines[1]
    assert "bits" in lines[2]
    assert "p 0." not in lines[2]
    assert page.run("document.querySelectorAll('.here').length") == 2


def test_nothing_old_is_said_of_a_new_text(page):
    page.run("document.getElementById('most').value = 5; document.getElementById('continue').click()")
    page.wait_for("[...document.querySelectorAll('.finish')].every((one) => /asked for|ended/.test(one.textContent))")
    page.wait_for("document.querySelectorAll('.keep:enabled').length > 0")
    # At once, before anybody could have answered.
    said = page.run(
        "(() => { const text = document.getElementById('text'); text.value = 'another'; "
        "text.dispatchEvent(new Event('input', { bubbles: true })); "
        "document.querySelector('pre.shown [data-n=\"1\"]').dispatchEvent(new Event('pointerover', { bubbles: true })); "
        "return [document.querySelectorAll('.keep:enabled').length, document.getElementById('detail').innerText]; })()"
    )
    assert said[0] == 0
    assert said[1].count("not computed yet") == 2
    assert "bits" not in said[1]
    page.wait_for(READY)
    assert page.run("document.querySelectorAll('.keep:enabled').length") == 0


def test_a_run_that_ends_is_asked_about_again_and_a_checkpoint_that_is_gone_is_named(page):
    found = page.run(
        "(async () => { const { Panel } = await import('./panel.js'); "
        "const info = { name: 'm', about: '', parameters: 1, levels: 1, total_steps: 10, step: 5, "
        "  steps: [3, 5], finished: false }; "
        "const panel = new Panel(info, 0, {}); const slider = panel.find('.steps input'); "
        "const say = (other) => [panel.update({ ...info, ...other }), panel.find('.steps output').textContent, "
        "  Number(slider.value), Number(slider.max)]; "
        "const followed = [say({}), say({ steps: [5, 7] }), say({ steps: [5, 10] }), "
        "  say({ steps: [5, 10], finished: true }), say({ steps: [5, 10], finished: true })]; "
        "panel.step = 3; return [followed, say({}), say({ steps: [5, 7] }), say({ steps: [5, 10], finished: true })]; })()"
    )
    assert found == [
        [
            [False, "step 5 of 10", 1, 1],
            [True, "step 7 of 10", 1, 1],
            [True, "step 10 of 10", 1, 1],
            [True, "the end", 1, 1],
            [False, "the end", 1, 1],
        ],
        [False, "step 3 of 10", 0, 1],
        [False, "step 3 of 10, no longer kept", 0, 2],
        [False, "step 3 of 10, no longer kept", 0, 2],
    ]


def test_switches_change_colours_boundaries_and_the_list_of_tokens(page):
    background = "getComputedStyle(document.querySelector('pre.shown [data-n=\"1\"]')).backgroundColor"
    before = page.run(background)
    page.run("document.querySelector('input[value=bits]').click()")
    assert page.run(background) != before
    page.run("document.querySelector('details summary').click()")
    page.wait_for("document.querySelectorAll('.tokens li').length > 0")
    tokens = page.run("[...document.querySelectorAll('.tokens li')].map((one) => one.firstChild.textContent).join('')")
    assert tokens == "so it goes"
    page.run("document.querySelector('input[value=greedy]').click()")
    page.wait_for(READY)
    marks = "[...document.querySelectorAll('pre.shown')][0].querySelectorAll('[class*=b1]').length"
    greedy = page.run(marks)
    high = "[...document.querySelectorAll('pre.shown [data-n]')].filter((one) => /p(1[1-9]|20)/.test(one.className)).length"
    assert greedy == page.run(high)


def test_a_text_goes_on_and_stops_and_is_added(page):
    page.run("document.getElementById('most').value = 9; document.getElementById('continue').click()")
    page.wait_for("[...document.querySelectorAll('.finish')].every((one) => /asked for|ended/.test(one.textContent))")
    page.wait_for("document.getElementById('stop').disabled")
    page.run("document.querySelector('.keep').click()")
    page.wait_for(f"{READY} && document.querySelector('pre.shown').textContent.length > 10")
    assert page.run("document.getElementById('text').value").startswith("so it goes")
    page.run("document.getElementById('most').value = 4096; document.getElementById('continue').click()")
    page.wait_for("document.querySelector('.finish').textContent.includes('goes on')")
    page.run("document.getElementById('stop').click()")
    assert "stopped" in page.run("document.querySelector('.finish').textContent")
    assert page.run("document.getElementById('stop').disabled")
    write(page, "so it goes")


def test_everything_can_be_done_with_keys(page):
    order = []
    page.run("document.getElementById('text').focus()")
    for _ in range(15):
        page.press("Tab")
        order.append(page.run("(({ id, className, name }) => id || name || className)(document.activeElement)"))
        if order[-1] == "text shown":
            break
    wanted = ["escapes", "open", "boundaries", "seed", "colour", "temperature", "most", "continue", "save-html"]
    assert [one for one in order if one in wanted] == wanted
    assert order[-1] == "text shown"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    for key, ctrl, place in (
        ("ArrowRight", False, 1),
        ("End", False, 9),
        ("ArrowLeft", False, 8),
        ("Home", True, 0),
        ("ArrowLeft", False, 0),
    ):
        page.press(key, ctrl=ctrl)
        assert f"byte {place}," in detail(page), key
    page.press("ArrowRight", ctrl=True)
    starts = page.run("document.querySelector('pre.shown .here').previousSibling?.className ?? 'b1'")
    assert "b1" in starts or "byte 9," in detail(page)


def test_bytes_that_are_no_characters_stay_what_they_are(page):
    page.run("document.getElementById('escapes').click()")
    page.run("document.getElementById('text').select()")
    page.type("a\\xe2\\x82b")
    page.wait_for(f"{READY} && document.getElementById('size').textContent.startsWith('4 ')")
    assert page.run(SHOWN)[0] == "a��b"
    kept = page.run(
        "(async () => { const { bytesOf, textOf } = await import('./content.js'); "
        "const bytes = Uint8Array.of(0x5c, 0x78, 0x34, 0x31, 0xe2, 97, 0xc3); "
        "const { text, escapes } = textOf(bytes); return [text, escapes, ...bytesOf(text, escapes)]; })()"
    )
    assert kept == ["\\x5cx41\\xe2a\\xc3", True, 0x5C, 0x78, 0x34, 0x31, 0xE2, 97, 0xC3]
    # A text field has no carriage returns: this one has as many bytes after it was there.
    kept = page.run(
        "(async () => { const { bytesOf, textOf } = await import('./content.js'); "
        "const { text, escapes } = textOf(Uint8Array.of(97, 13, 10, 0xc3, 0xa9, 10)); "
        "const field = document.createElement('textarea'); field.value = text; "
        "return [text, escapes, ...bytesOf(field.value, escapes)]; })()"
    )
    assert kept == ["a\\x0d\né\n", True, 97, 13, 10, 0xC3, 0xA9, 10]


def test_a_long_text_is_drawn_where_it_is_looked_at(page):
    size = 6_000
    page.run(f"document.getElementById('text').value = 'so it goes '.repeat({size // 11 + 1}).slice(0, {size})")
    page.run("document.getElementById('text').dispatchEvent(new Event('input', { bubbles: true }))")
    page.wait_for(f"{READY} && document.getElementById('size').textContent.startsWith('6,000 ')")
    assert [len(one) for one in page.run(SHOWN)] == [size, size]
    assert 0 < page.run("document.querySelectorAll('pre.shown [data-n]').length") < size
    page.run("document.getElementById('text').value += 'x'.repeat(1000000)")
    page.run("document.getElementById('text').dispatchEvent(new Event('input', { bubbles: true }))")
    page.wait_for("document.getElementById('notice').textContent.includes('takes up to 1,000,000')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_windows_and_dark_ones_show_everything(page, dark):
    page.show_as(width=360, height=740, dark=dark)
    page.point("pre.shown [data-n='1']")
    page.wait_for("document.getElementById('detail').innerText.includes('byte 1')")
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.run("document.getElementById('detail').getBoundingClientRect().height") < 250
    colours = page.run(
        "[document.body, ...document.querySelectorAll('pre.shown, textarea, pre.shown [data-n]')].map((one) => "
        "[getComputedStyle(one).backgroundColor, getComputedStyle(one).color])"
    )
    page.run("document.querySelector('input[value=bits]').click()")
    colours += page.run(
        "[...document.querySelectorAll('pre.shown [data-n]')].map((one) => "
        "[getComputedStyle(one).backgroundColor, getComputedStyle(one).color])"
    )
    contrasts = [contrast(*pair) for pair in colours if "0, 0, 0, 0" not in pair[0]]
    assert len(contrasts) > 10
    assert min(contrasts) > 4.5
    # The ground is dark where the window is.
    assert (sum(numbers(colours[0][0])) < 300) == dark


def numbers(colour):
    return [float(one) for one in colour.partition("(")[2].rstrip(")").split(",")[:3]]


def contrast(one, other):
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2)."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in numbers(colour))
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
