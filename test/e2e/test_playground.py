"""The playground in a real browser, where there is one."""

import pytest

from browser import CHROMIUM, open_page
from server_process import launch, parallel_flags

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


def test_a_conversation_in_the_browser(tmp_path):
    with (
        launch(tmp_path / "log", *parallel_flags(2), "--enable-metrics") as server,
        open_page(tmp_path / "profile") as page,
    ):
        page.call("Page.navigate", url=server.url)
        page.wait_for("document.querySelector('#model')?.textContent.includes('nibble')")

        page.evaluate("temperature.value = 0; max_tokens.value = 60; $('prompt').focus()")
        page.type("What is 17 plus 25?")
        page.press("Enter")
        page.wait_for("document.querySelector('.speed')?.textContent.includes('tokens/s')")
        assert page.evaluate("document.querySelector('.text').textContent") == "17 plus 25 is 42."

        page.evaluate("temperature.value = 1.5; compare.click(); $('prompt').focus()")
        page.type("What is 2 plus 2?")
        page.press("Enter")
        page.wait_for("[...document.querySelectorAll('.speed')].filter((e) => e.textContent).length === 3")
        titles = page.evaluate("[...document.querySelectorAll('.answers:last-child h3')].map((e) => e.textContent)")
        assert titles == ["temperature 1.5", "greedy"]

        figures = page.wait_for("figures.innerText.includes('rank 1') && figures.innerText")
        for name in ("tokens/s", "dispatched", "rows/s, rank 0"):
            assert name in figures
        page.wait_for("!figures.innerText.includes('dispatched in all\\n0 B')")

        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        controls = [
            n for n in tree if n.get("role", {}).get("value") in ("textbox", "spinbutton", "checkbox", "button")
        ]
        assert len(controls) >= 9
        assert all(control.get("name", {}).get("value") for control in controls), "every control has a name"
        assert page.problems == []
        page.screenshot(tmp_path / "playground.png")


def test_what_the_server_refuses_is_shown_and_html_stays_text(tmp_path):
    with launch(tmp_path / "log", "--api-key", "secret") as server, open_page(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url)
        page.wait_for("model.textContent.includes('API key')")
        page.evaluate("key.value = 'secret'; key.dispatchEvent(new Event('change'))")
        page.wait_for("model.textContent.includes('nibble')")
        page.wait_for("figures.innerText.includes('--enable-metrics')")
        page.evaluate("max_tokens.value = 100000; $('prompt').value = '<b>bold</b>'; $('ask').requestSubmit()")
        page.wait_for("document.querySelector('.failed')?.innerText.includes('max_tokens (100000)')")
        assert page.evaluate("document.querySelector('.mine').innerHTML") == "&lt;b&gt;bold&lt;/b&gt;"
