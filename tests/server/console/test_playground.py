"""The playground in a browser, against a real server: answers as they stream, budgets, three at once, errors."""

import re

import httpx
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e .[test]")

from playwright.sync_api import Page, Route, expect

from tests.bundled import FLOOR, FULL, LADDER
from tests.server.console.browser import Console
from tests.server.console.conftest import OpenPage
from tests.server.real_server import Server, serving

pytestmark = pytest.mark.slow


def answer_text(page: Page, place: int = 0) -> str:
    return page.locator(".answer-text").nth(place).inner_text()


def submodels_shown(page: Page, place: int = 0) -> set[str]:
    tokens = page.locator(".answer").nth(place).locator(".answer-text .token")
    shown: set[str] = set(tokens.evaluate_all("tokens => tokens.map((token) => token.dataset.submodel)"))
    return shown


def facts(page: Page, place: int = 0) -> dict[str, str]:
    found = page.locator(".answer").nth(place).locator(".facts div")
    return {row.split("\n")[0]: row.split("\n")[1] for row in found.all_inner_texts()}


def test_it_says_what_is_served(console: Console, console_server: Server) -> None:
    page = console.page
    version = httpx.get(f"{console_server.url}/version").json()["version"]
    expect(page.locator(".model")).to_have_text("bundled")
    expect(page.locator(".version")).to_have_text(version)
    expect(page.get_by_role("tab")).to_have_text(["Playground", "Live", "Ladder"])
    options = page.get_by_label("Smallest sub-model accepted").locator("option")
    expect(options).to_have_text(["The server's choice", *LADDER])


def test_an_answer_streams_with_tinted_tokens(console: Console) -> None:
    page = console.page
    console.set_number("Max tokens", 48)
    console.set_number("Temperature", 0)
    console.ask()
    assert len(answer_text(page)) > 20
    assert submodels_shown(page) == {FULL}, "without a budget it is the full model"
    token = page.locator(".answer-text .token").first
    looks = token.evaluate(
        "token => { const s = getComputedStyle(token); return [s.backgroundColor, s.textDecorationStyle] }"
    )
    assert looks[0].startswith("oklch"), looks
    assert looks[1] in ("dotted", "dashed", "solid", "double", "wavy")
    assert re.match(rf"{FULL} · token 1 · \d", token.get_attribute("title") or "")
    expect(page.locator(".answer .legend li")).to_have_text(re.compile(rf"^{FULL}\s*48\s*100 %$"))
    told = facts(page)
    assert told["Tokens"] == "48"
    assert (told["Switches"], told["K/V"], told["Ended by"]) == ("0", "exact", "length")
    sent = console.requests[-1]
    assert sent["url"].endswith("/v1/completions")
    assert sent["body"]["stream_options"] == {"include_usage": True}
    assert (sent["body"]["max_tokens"], sent["body"]["temperature"]) == (48, 0)
    assert not [name for name in sent["headers"] if name.startswith(("x-latency", "x-submodel"))]
    expect(page.locator(".badge")).to_have_text("no budget")


def test_a_budget_is_sent_and_its_outcome_is_shown(console: Console) -> None:
    page = console.page
    console.set_number("Latency budget, milliseconds; empty for none", 60_000)
    console.ask()
    sent = console.requests[-1]["headers"]
    assert (sent["x-latency-budget-ms"], sent["x-latency-budget-policy"]) == ("60000", "best-effort")
    expect(page.locator(".answer .badge")).to_have_text(re.compile(r"met · .* to spare"))
    assert re.search(r"predicted\s*[\d.]+ m?s\s*budget\s*60\.0 s", page.locator(".timing-key").inner_text())
    # as the server measured it, from the stream's last chunk
    assert re.fullmatch(r"[\d.]+ m?s", page.locator(".taken").inner_text())
    console.set_number("Latency budget, milliseconds; empty for none", 0.1)
    console.ask()
    assert submodels_shown(page) == {FLOOR}
    expect(page.locator(".answer .badge")).to_have_text(re.compile(r"missed by "))


def test_switches_show_within_an_answer(console: Console, console_server: Server) -> None:
    """The page's chunks name different sub-models where the server says that it switched."""
    page = console.page
    console.set_number("Max tokens", 200)
    listed = httpx.get(f"{console_server.url}/v1/submodels").json()["data"]
    full = listed[-1]["predicted_ttft_ms"] + 199 * listed[-1]["predicted_tpot_ms"]
    for share in (0.8, 0.65, 0.5, 0.4, 0.9):  # somewhere between the cheapest and the full one it has to switch
        console.set_number("Latency budget, milliseconds; empty for none", round(full * share))
        console.ask()
        if int(facts(page)["Switches"]) > 0:
            break
    shown = submodels_shown(page)
    assert len(shown) > 1, shown
    legend = page.locator(".answer .legend .swatch").all_inner_texts()
    assert shown <= set(legend) <= set(LADDER)
    assert legend == [name for name in LADDER if name in legend], "in ladder order"


def test_the_smallest_feasible_budget_is_marked(console: Console, console_server: Server) -> None:
    page = console.page
    mark = page.get_by_role("button", name="smallest feasible")
    expect(mark).to_be_visible()
    mark.click()
    typed = page.get_by_label("Latency budget, milliseconds; empty for none")
    small = float(typed.input_value())
    cheapest = httpx.get(f"{console_server.url}/v1/submodels").json()["data"][0]
    predicted = cheapest["predicted_ttft_ms"] + 63 * cheapest["predicted_tpot_ms"]
    assert predicted / 20 < small < predicted * 20, "the same figure, give or take how busy the machine is"
    page.get_by_label("Smallest sub-model accepted").select_option(FULL)
    mark.click()
    assert float(typed.input_value()) > small * 1.5, "a higher floor needs more time"
    console.ask()
    assert console.requests[-1]["headers"]["x-submodel-floor"] == FULL
    assert submodels_shown(page) == {FULL}


def test_three_budgets_side_by_side(console: Console) -> None:
    page = console.page
    console.set_number("Max tokens", 120)
    page.get_by_role("switch", name="Compare three budgets").check()
    expect(page.locator(".column")).to_have_count(3)
    for place, ms in enumerate((0.5, 400, "")):
        console.set_number(f"Budget {place + 1}, milliseconds; empty for none", ms)
    page.get_by_role("button", name="Ask three times").click()
    together = (
        "() => [...document.querySelectorAll('.answer')].every((a) => a.querySelector('.token.tinted:not(.swatch)'))"
    )
    page.wait_for_function(together)
    page.get_by_role("button", name="Ask three times").wait_for()
    asked = [request["headers"].get("x-latency-budget-ms") for request in console.requests]
    assert asked == ["0.5", "400", None]
    assert len({request["body"]["seed"] for request in console.requests}) == 1, "only the sub-models differ"
    assert submodels_shown(page, 0) == {FLOOR}
    assert submodels_shown(page, 2) == {FULL}
    assert all(facts(page, place)["Tokens"] == "120" for place in range(3))
    expect(page.locator(".playground > [role=status]")).to_have_text(
        re.compile("Answer 1: 120 tokens in .* Answer 3: ")
    )


def test_stop(console: Console, console_server: Server) -> None:
    page = console.page
    console.set_number("Max tokens", 1000)
    page.get_by_role("button", name="Ask").click()
    page.locator(".answer-text .token").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".answer .badge")).to_have_text("stopped")
    assert 0 < page.locator(".answer-text .token").count() < 1000
    page.wait_for_function(
        "async () => (await (await fetch('metrics')).text()).includes('sortserve_requests_running{model=\"bundled\"} 0.0')"
    )
    console.set_number("Max tokens", 8)
    console.ask()
    assert facts(page)["Tokens"] == "8"


def test_errors_are_shown_from_the_error_object(open_page: OpenPage, console_server: Server) -> None:
    with open_page() as console:
        console.open(console_server.url)
        page = console.page
        page.get_by_role("radio", name="Strict").check()
        console.set_number("Latency budget, milliseconds; empty for none", 0.1)
        page.get_by_role("button", name="Ask").click()
        shown = page.locator(".failure").inner_text()
        assert "atency budget infeasible" in shown
        assert "smallest" in shown
        assert "HTTP 400" in shown
        console.set_number("Max tokens", 100_000)
        page.get_by_role("radio", name="Best effort").check()
        page.get_by_role("button", name="Ask").click()
        expect(page.locator(".failure")).to_contain_text("100000")
        # Chromium itself logs a refused request; nothing else may be there
        assert [text for text in console.complaints if "status of 400" not in text] == []


def test_an_error_in_the_middle_of_a_stream(open_page: OpenPage, console_server: Server) -> None:
    """What had come stays, and the error is told. The server's part of it is tested with a back end that fails."""

    def broken(route: Route) -> None:
        chunk = '{"choices": [{"index": 0, "text": "half an"}], "system_fingerprint": "sortserve-1-full"}'
        error = (
            '{"error": {"message": "the engine died", "type": "server_error", "param": null, "code": "engine_failed"}}'
        )
        body = f"data: {chunk}\n\ndata: {error}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    with open_page() as console:
        console.open(console_server.url)
        console.page.route("**/v1/completions", broken)
        console.page.get_by_role("button", name="Ask").click()
        expect(console.page.locator(".failure")).to_contain_text("the engine died")
        expect(console.page.locator(".answer-text")).to_have_text("half an")
        assert console.complaints == []


def test_chat(console: Console) -> None:
    page = console.page
    page.get_by_role("radio", name="Chat").check()
    console.set_number("Max tokens", 16)
    console.ask()
    sent = console.requests[-1]
    assert sent["url"].endswith("/v1/chat/completions")
    assert [message["role"] for message in sent["body"]["messages"]] == ["user"]
    assert facts(page)["Tokens"] == "16"
    assert submodels_shown(page) == {FULL}


def test_text_is_text(console: Console) -> None:
    """What a model writes is never markup."""
    chunk = r'{"choices": [{"index": 0, "text": "<img src=x onerror=alert(1)><b>hi</b>"}], "system_fingerprint": null}'
    console.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {chunk}\n\ndata: [DONE]\n\n"),
    )
    console.page.get_by_role("button", name="Ask").click()
    expect(console.page.locator(".answer-text")).to_have_text("<img src=x onerror=alert(1)><b>hi</b>")
    assert console.page.locator(".answer-text img").count() == 0
    expect(console.page.locator(".answer-text .token")).to_have_class(re.compile("untinted"))


def test_a_key(open_page: OpenPage) -> None:
    """The page comes without one, says that one is needed, keeps it for the tab only, and sends it."""
    with serving("--api-key", "open sesame") as own, open_page() as console:
        page = console.page
        page.goto(own.url)
        expect(page.locator(".notice")).to_contain_text("asks for an API key")
        page.get_by_label("API key").fill("wrong")
        page.get_by_label("API key").press("Enter")
        expect(page.locator(".notice")).to_contain_text("does not know this API key")
        page.get_by_label("API key").fill("open sesame")
        page.get_by_label("API key").press("Enter")
        expect(page.locator(".notice")).to_have_count(0)
        console.ask()
        assert console.requests[-1]["headers"]["authorization"] == "Bearer open sesame"
        page.reload()
        page.locator("#panel-ladder tbody tr").first.wait_for(state="attached")
        assert page.evaluate("localStorage.length") == 0
        assert [text for text in console.complaints if "status of 401" not in text] == []


def await_scrape(page: Page) -> None:
    """Wait until the page has drawn the numbers of a scrape anew."""
    page.wait_for_event("requestfinished", lambda request: request.url.endswith("/metrics"))
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")


@pytest.mark.parametrize(
    ("label", "typed", "stands"),
    [
        ("API key", ("open ", "sesame"), "open sesame"),
        ("Prompt", ("Once", " more"), "Once more"),
        ("Max tokens", ("12", "8"), "128"),
        ("Temperature", ("0.", "7"), "0.7"),
        ("Latency budget, milliseconds; empty for none", ("12.", "50"), "12.50"),
    ],
)
def test_what_is_typed_slowly_stays(console: Console, label: str, typed: tuple[str, str], stands: str) -> None:
    """The key field was set back to the key in use at every scrape, and "0." to 0: what was typed was lost.

    With "wrong" in use and a scrape between filling in the right key and Enter, Enter changed nothing: `test_a_key` failed.
    """
    field = console.page.get_by_label(label, exact=True)
    field.fill("")
    field.press_sequentially(typed[0])
    await_scrape(console.page)
    field.press_sequentially(typed[1])
    assert field.input_value() == stands


def test_an_answer_for_an_older_key_changes_nothing(open_page: OpenPage, console_server: Server) -> None:
    """The refusal of a wrong key came after the ladder for the right one, and the page said again that it was wrong."""
    held: list[Route] = []

    def submodels(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer wrong":
            held.append(route)
        else:
            route.continue_()

    with open_page() as console:
        page = console.page
        page.route("**/v1/submodels", submodels)
        console.open(console_server.url)
        field = page.get_by_label("API key")
        with page.expect_request(lambda request: request.headers.get("authorization") == "Bearer wrong"):
            field.fill("wrong")
            field.press("Enter")
        with page.expect_request_finished(
            lambda request: request.url.endswith("/v1/submodels") and "right" in request.headers["authorization"]
        ):
            field.fill("right")
            field.press("Enter")
        refusal = {"error": {"message": "no such key", "type": "authentication_error", "param": None, "code": "bad"}}
        for route in held:
            route.fulfill(status=401, json=refusal)
        await_scrape(page)
        assert page.locator(".notice").count() == 0
