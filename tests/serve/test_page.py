"""The page in a real Chromium."""

from __future__ import annotations

import contextlib
import time

import browser
import pytest
import serving
from browser import Page, Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from small import config_of, saved

from pyargs.decode.engine import Engine
from pyargs.serve.users import make_router
from pyargs.training.hooks import method

pytestmark = pytest.mark.skipif(
    not (browser.BROWSER and browser.DRIVER),
    reason="no chromium and chromedriver: Debian's chromium, chromium-driver",
)
NASTY = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"


@pytest.fixture
def service():
    made = Service()
    with serving.served(made.app()) as made.address:
        yield made
        made.open.set()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def opened(chromium, service):
    return Page(chromium, service.address).loaded()


def test_the_answers_of_three_users_and_of_nobody_stream_side_by_side(opened, service):
    service.open.clear()
    opened.pick("", "ann", "bob", "cid")
    opened.ask()
    opened.wait(lambda: opened.texts("#answers .text") == ["Dear"] * 4)  # before any of them has ended
    assert all(card.get_attribute("aria-busy") == "true" for card in opened.all("#answers article"))
    rows = {card.rect["y"] for card in opened.all("#answers article")}
    assert len(rows) == 1
    service.open.set()
    opened.wait(opened.ended)
    assert opened.texts("#answers .text") == [f"Dear {who}, hello." for who in ("all", "ann", "bob", "cid")]
    assert "4 tokens" in opened.texts("#answers .note")[0]
    unguided, *guided = sorted(service.asked, key=lambda body: body.get("user", ""))
    assert "user" not in unguided and "strength" not in unguided
    assert [body["user"] for body in guided] == ["ann", "bob", "cid"]


def test_the_service_itself_answers_its_page(chromium, lm_folder):
    with serving.service(serving.engine(lm_folder)) as (_, address):
        opened = Page(chromium, address)
        opened.wait(lambda: opened.texts("#model") == [f"Served here: {serving.MODEL}"])
        opened.pick("")
        opened.one("#find").send_keys(serving.USERS[0], Keys.ENTER)
        opened.one("#ask details summary").click()
        opened.one("#max-tokens").clear()
        opened.one("#max-tokens").send_keys("5")
        opened.ask()
        opened.wait(opened.ended)
        assert len(opened.all("#answers article")) == 2 and not opened.all("#answers [role=alert]")
        assert all("token" in note for note in opened.texts("#answers .note"))


def test_a_model_without_rewards_is_asked_with_what_it_takes(opened, service):
    """As P-DPO, which has a prompt of each user, and where nobody can come."""
    service.fields, service.needs_user, service.keeps = ["min_p"], True, False
    opened = Page(opened.driver, service.address).loaded()
    assert [box.get_attribute("value") for box in opened.all("#users input")] == ["ann", "bob", "cid"], "nobody is no choice"
    assert not opened.one("#strength").is_displayed() and not opened.one("#new-user").is_displayed()
    opened.ask()
    opened.wait(opened.ended)
    assert [body["user"] for body in service.asked] == ["ann", "bob"]
    for body in service.asked:
        assert not {"strength", "reward_weight", "num_candidates"} & body.keys() and body["top_logprobs"] == 10
    assert opened.texts("#answers h3") == ["ann", "bob"] and not opened.all("#answers .moved")
    assert opened.one("#legend").is_displayed() and "without the reward" not in opened.one("#legend").text


@pytest.mark.parametrize("name", ["pdpo", "icl", "global_rm", "zero_shot"])
def test_the_page_of_every_kind_of_model_gets_answers(chromium, lm_folder, tmp_path, name):
    if name != "zero_shot":
        model = saved(method(name), config_of(name, lm_folder), tmp_path / name, lm_folder)
    if name == "icl":
        model.demonstrations.of_user["a"] = [{"prompt": "cat", "chosen": "dog", "rejected": "axe"}]
        model.save_pretrained(tmp_path / name)
    own = None if name == "zero_shot" else str(tmp_path / name)
    engine = Engine(None if name in ("pdpo", "icl") else lm_folder, own)
    with serving.worker(engine) as worker:
        app = serving.make_app(worker, model=serving.MODEL, routers=[make_router(worker)])
        with serving.served(app) as address:
            opened = Page(chromium, address)
            opened.wait(lambda: opened.texts("#model") == [f"Served here: {serving.MODEL}"])
            opened.one("#find").send_keys("a", Keys.ENTER)  # where a model is the same for everyone, a label
            opened.one("#ask details summary").click()
            opened.one("#max-tokens").clear()
            opened.one("#max-tokens").send_keys("3")
            opened.ask()
            opened.wait(opened.ended)
            assert opened.all("#answers article") and opened.texts("#error") == [""]
            assert not opened.all("#answers [role=alert]"), opened.texts("#answers")


def test_at_most_four_users_are_picked(opened, service):
    service.users = list("abcdef")
    opened = Page(opened.driver, service.address).loaded()
    opened.pick("", *"abcd")
    closed = [box.get_attribute("value") for box in opened.all("#users input") if not box.is_enabled()]
    assert closed == ["e", "f"]
    opened.pick("", *"abc")
    assert all(box.is_enabled() for box in opened.all("#users input"))


def test_one_of_many_users_is_found_by_a_part_of_the_id(opened, service):
    service.users = [f"user-{number}" for number in range(500)]
    opened = Page(opened.driver, service.address).loaded()
    assert len(opened.all("#users input")) < 100
    opened.pick()
    opened.one("#find").send_keys("-321", Keys.ENTER)
    opened.ask()
    opened.wait(opened.ended)
    assert [body["user"] for body in service.asked] == ["user-321"]


def test_a_user_whom_the_list_lacks_is_picked_by_the_id(opened, service):
    opened.pick()
    opened.one("#find").send_keys("zoe", Keys.ENTER)
    opened.ask()
    opened.wait(opened.ended)
    assert [body["user"] for body in service.asked] == ["zoe"]


def test_the_slider_is_the_strength_that_is_asked_for(opened, service):
    opened.pick("", "ann")
    for strength in (1.0, 2.3, 0.0):
        opened.slide(strength)
        assert opened.texts("#strength-shown") == [f"{strength:.1f}"]
        opened.ask()
        opened.wait(opened.ended)
    assert [body["strength"] for body in service.asked if "user" in body] == [1.0, 2.3, 0.0]


def test_where_the_unit_of_strength_is_not_known_the_slider_is_the_weight(opened, service):
    service.fields.remove("strength")
    opened = Page(opened.driver, service.address).loaded()
    assert opened.one("#strength").accessible_name == "Weight of the reward"
    opened.pick("ann")
    opened.slide(2.3)
    opened.ask()
    opened.wait(opened.ended)
    assert [(body["reward_weight"], "strength" in body) for body in service.asked] == [(2.3, False)]
    assert opened.texts("#answers h3") == ["ann, weight 2.3"] and "4 changed by the reward" in opened.one("#answers").text


def test_what_is_set_is_sent(opened, service):
    opened.one("#ask details summary").click()
    for name, value in {"max-tokens": 7, "num-candidates": 3, "temperature": 0.5, "seed": 11}.items():
        opened.one(f"#{name}").clear()
        opened.one(f"#{name}").send_keys(str(value))
    opened.one("#prompt").clear()
    opened.one("#prompt").send_keys("Hello!")
    opened.pick("bob")
    opened.ask()
    opened.wait(opened.ended)
    assert service.asked == [
        {
            **dict(model="tiny", messages=[{"role": "user", "content": "Hello!"}], user="bob", strength=1, max_tokens=7),
            **dict(temperature=0.5, seed=11, num_candidates=3, logprobs=True, top_logprobs=3),
            **dict(stream=True, stream_options={"include_usage": True}),
        }
    ]


def test_a_token_shows_its_candidates_and_which_would_have_won_without_the_reward(opened):
    opened.pick("", "ann")
    opened.ask()
    opened.wait(opened.ended)
    unguided, guided = opened.all("#answers article")
    assert not opened.one("#candidates").is_displayed()
    opened.hover(guided.find_elements(By.CSS_SELECTOR, ".token")[1])
    opened.wait(lambda: opened.one("#candidates").is_displayed())
    cells = [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in opened.all("#candidates tr")]
    assert cells == [
        ["token", "log-prob", "reward", "score", ""],
        ["␣else", "-0.50", "0.250", "0.00", "wins without reward"],
        ["␣ann", "-1.50", "1.25", "1.00", "chosen"],  # -1.5 + 2 x 1.25
    ]
    assert len(guided.find_elements(By.CSS_SELECTOR, ".moved")) == 4 and "4 changed by the reward" in guided.text
    assert not unguided.find_elements(By.CSS_SELECTOR, ".moved")
    opened.hover(opened.one("#candidates"))  # it stays where it can be read
    time.sleep(0.4)
    assert opened.one("#candidates").is_displayed()
    opened.hover(opened.one("h1"))
    opened.wait(lambda: not opened.one("#candidates").is_displayed())
    opened.hover(unguided.find_elements(By.CSS_SELECTOR, ".token")[1])
    opened.wait(lambda: opened.texts("#candidates thead th") == ["token", "log-prob", ""])


def test_of_a_sampled_token_no_winner_is_named(opened):
    opened.one("#ask details summary").click()
    opened.one("#temperature").clear()
    opened.one("#temperature").send_keys("1")
    opened.pick("ann")
    opened.ask()
    opened.wait(opened.ended)
    opened.hover(opened.all(".token")[0])
    opened.wait(lambda: "likeliest without reward" in opened.one("#candidates").text)
    assert not opened.all("#answers .moved") and "by the reward" not in opened.one("#answers").text


def test_answers_without_log_probs_are_plain_text(opened, service):
    service.logprobs = False
    opened.pick("ann")
    opened.ask()
    opened.wait(opened.ended)
    assert opened.texts("#answers .text") == ["Dear ann, hello."]
    assert not opened.all("#answers .token") and not opened.one("#legend").is_displayed()


def test_a_keyboard_is_enough(opened, service):
    """From the top of the page with the tab key, the space bar, arrows and the keys of a text."""

    def to(css: str) -> None:
        for _ in range(60):
            if opened.driver.execute_script("return document.activeElement.matches(arguments[0])", css):
                return
            opened.press(Keys.TAB)
        raise AssertionError(f"the tab key does not reach {css}")

    opened.press(Keys.TAB)
    to('#users input[value=""]')
    if opened.focused().is_selected():
        opened.press(Keys.SPACE)
    to('#users input[value="bob"]')
    if not opened.focused().is_selected():
        opened.press(Keys.SPACE)
    to("#prompt")
    opened.press(" And then?")
    to("#strength")
    opened.press(Keys.ARROW_RIGHT)
    to("#ask .main")
    opened.press(Keys.ENTER)
    opened.wait(opened.ended)
    asked = service.asked[-1]
    assert asked["strength"] == 1.1 and " And then?" in asked["messages"][0]["content"]
    to(".token")
    opened.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert opened.focused().text.strip() in ("ann", "bob")
    assert opened.one("#candidates").is_displayed()
    assert opened.focused().get_attribute("aria-describedby") == "candidates"
    opened.press(Keys.ESCAPE)
    assert not opened.one("#candidates").is_displayed()
    opened.press(Keys.END)
    assert opened.focused().text.strip() == "hello."
    opened.press(Keys.TAB)  # one stop for each answer
    assert "hello." not in opened.focused().text or opened.focused().tag_name != "span"


def test_ctrl_and_enter_ask(opened, service):
    opened.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    opened.wait(opened.ended)
    assert service.asked


@pytest.mark.parametrize("width", [400, 1200])
def test_no_screen_scrolls_sideways(opened, service, width):
    service.users = ["ann", "b" * 128, "user with a name of several words " * 3]
    service.answered = {None: ["x" * 300, " and", "\n\n", "more" * 100]}
    opened.driver.set_window_size(width, 800)  # a window is 500 wide at least, and the screen may be narrower
    screen = dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        opened.driver.get(service.address)
        opened.loaded().pick("", *service.users)
        opened.ask()
        opened.wait(opened.ended)
        opened.hover(opened.all(".token")[0])
        opened.wait(lambda: opened.one("#candidates").is_displayed())
        opened.one("#key-box summary").click()
        opened.one("#new button").click()
        opened.wait(lambda: opened.one("#choosing").is_displayed())
        wide = "return [document.documentElement.scrollWidth, innerWidth]"
        scrolled, inner = opened.driver.execute_script(wide)
        assert inner == width and scrolled <= inner
    finally:
        opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_markup_of_a_model_and_of_a_user_stays_text(opened, service):
    service.users = [NASTY]
    service.answered = {NASTY: [NASTY, "</p><script>document.title='broken'</script>"], None: [NASTY]}
    opened = Page(opened.driver, service.address).loaded()
    opened.pick("", NASTY)
    opened.ask()
    opened.wait(opened.ended)
    opened.hover(opened.all(".token")[0])
    opened.wait(lambda: opened.one("#candidates").is_displayed())
    assert opened.texts("#answers .text") == [NASTY, NASTY + "</p><script>document.title='broken'</script>"]
    assert NASTY in opened.texts("#users label")[1]
    assert not opened.all("#answers img, #users img, #candidates img, #answers b, #answers script, #users b")
    assert opened.driver.title == "pyargs"


def test_the_browser_runs_nothing_but_the_page_itself(opened):
    """The policy of the page's content: neither a script that got in, nor a call to another place."""
    injected = "const s = document.createElement('script'); s.text = arguments[0]; document.body.append(s)"
    with contextlib.suppress(Exception):
        opened.driver.execute_script(injected, "document.title = 'broken'")
    assert opened.driver.title == "pyargs"
    away = "fetch('http://127.0.0.2:9/').then(() => arguments[0]('came'), () => arguments[0]('refused'))"
    assert opened.driver.execute_async_script(away) == "refused"
    assert any("Content Security Policy" in line["message"] for line in opened.driver.get_log("browser"))


def test_the_page_loads_without_a_complaint(opened, service):
    assert opened.driver.get_log("browser") == []
    names = "return performance.getEntriesByType('resource').map(one => one.name)"
    assert all(name.startswith(service.address) for name in opened.driver.execute_script(names))


def begin(opened) -> None:
    opened.one("#new-prompts").clear()
    opened.one("#new-prompts").send_keys("First?\nSecond?\nThird?")
    opened.one("#new button").click()


def choose(opened, number: int) -> str:
    """Chooses one of two answers, once both are there. Returns its text."""
    buttons = opened.all("#pair button")
    opened.wait(lambda: all(button.get_attribute("aria-disabled") == "false" for button in buttons))
    text = opened.texts("#pair .text")[number]
    buttons[number].click()
    return text


def test_a_new_user_chooses_and_can_be_picked_then(opened, service):
    name = "nia & co/1"
    begin(opened)
    opened.wait(lambda: "1 of 3: First?" in opened.texts("#question"))
    chosen = choose(opened, 1)
    opened.wait(lambda: "2 of 3: Second?" in opened.texts("#question"))
    opened.one("#skip").click()
    opened.wait(lambda: "3 of 3: Third?" in opened.texts("#question"))
    assert opened.texts("#adapt-now") == ["Adapt to 1 choice"]
    third = choose(opened, 0)
    opened.wait(lambda: opened.texts("#adapt-now") == ["Adapt to 2 choices"])
    opened.one("#new-id").send_keys(name, Keys.ENTER)
    opened.wait(lambda: f"{name} is among the users now" in opened.texts("#new-status")[0])
    pairs = service.pairs[name]
    assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [("First?", chosen), ("Third?", third)]
    assert all(pair["rejected"].startswith("seed ") and pair["rejected"] != pair["chosen"] for pair in pairs)
    assert opened.one("#new").is_displayed() and not opened.one("#choosing").is_displayed()
    assert opened.one(f'#users input[value="{name}"]').is_selected()
    opened.pick(name)
    opened.ask()
    opened.wait(opened.ended)
    assert service.asked[-1]["user"] == name


def test_choices_outlive_an_adaptation_that_failed(opened, service):
    service.job = "failed"
    begin(opened)
    chosen = choose(opened, 0)
    opened.wait(lambda: opened.texts("#adapt-now") == ["Adapt to 1 choice"])
    opened.one("#new-id").send_keys("nia", Keys.ENTER)
    opened.wait(lambda: "its pairs are too long" in opened.texts("#new-error")[0])
    assert not opened.all('#users input[value="nia"]')
    service.job = "done"
    opened.one("#new-id").send_keys("2", Keys.ENTER)
    opened.wait(lambda: "nia2 is among the users now" in opened.texts("#new-status")[0])
    assert [pair["chosen"] for pair in service.pairs["nia2"]] == [chosen]


def test_the_form_of_a_new_user_can_be_left(opened, service):
    begin(opened)
    choose(opened, 0)
    opened.wait(lambda: "2 of 3: Second?" in opened.texts("#question"))
    opened.one("#leave").click()
    assert opened.one("#new").is_displayed() and not opened.one("#choosing").is_displayed()
    begin(opened)  # from the beginning
    opened.wait(lambda: "1 of 3: First?" in opened.texts("#question"))
    assert opened.texts("#adapt-now") == ["Adapt to 0 choices"]
    assert not service.pairs


def test_two_equal_answers_are_no_choice(opened, service):
    service.sample = "the same"
    begin(opened)
    opened.wait(lambda: "give no choice" in opened.texts("#new-status")[0])
    opened.all("#pair button")[0].click()
    assert opened.texts("#question") == ["1 of 3: First?"]


def test_what_the_service_refuses_is_said(opened, service):
    opened.pick("", "ann")
    service.error = (429, "the queue is full")
    opened.ask()
    opened.wait(opened.ended)
    alerts = [node.text for node in opened.all("#answers [role=alert]")]
    assert alerts == ["the queue is full. Try again in 7 s."] * 2


def test_a_service_that_is_gone_is_said(opened, service):
    opened.driver.execute_cdp_cmd("Network.enable", {})
    offline = dict(latency=0, downloadThroughput=-1, uploadThroughput=-1)
    opened.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": True})
    try:
        opened.ask()
        opened.wait(opened.ended)
        assert "does not answer" in opened.one("#answers [role=alert]").text
    finally:
        opened.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})


def test_stop_ends_the_requests(opened, service):
    service.open.clear()
    opened.pick("", "ann")
    opened.ask()
    opened.wait(lambda: opened.texts("#answers .text") == ["Dear"] * 2)
    opened.one("#stop").click()
    opened.wait(lambda: opened.texts("#status") == ["Stopped."])
    assert opened.texts("#answers .text") == ["Dear"] * 2
    opened.wait(lambda: sorted(service.gone, key=str) == [None, "ann"])


def test_a_key_is_asked_for_and_sent(chromium, service):
    service.error = (401, "a key of this service is needed")
    opened = Page(chromium, service.address)
    opened.wait(lambda: opened.one("#key").is_displayed())
    assert "a key of this service is needed" in opened.one("#error").text
    service.error = None
    opened.one("#key").send_keys("pyargs-secret", Keys.ENTER)
    opened.loaded()
    assert service.headers[-1]["authorization"] == "Bearer pyargs-secret"
    assert opened.one("#key").get_attribute("type") == "password" and not opened.one("#key").is_displayed()


def test_everything_to_use_has_a_name_and_what_changes_is_told(opened):
    opened.one("#key-box summary").click()
    opened.one("#ask details summary").click()
    usable = [node for node in opened.all("button, input, textarea, summary") if node.is_displayed()]
    assert len(usable) > 15 and all(node.accessible_name for node in usable)
    assert [opened.one(f"#{name}").aria_role for name in ("status", "error", "new-status", "new-error")] == [
        *("status", "alert", "status", "alert")
    ]


def readable(first: str, second: str) -> float:
    """The contrast of two colours that the browser says, as WCAG has it."""

    def light(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].replace(",", " ").split()[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted([light(first), light(second)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_colour_schemes(opened, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        opened.pick("ann")
        opened.ask()
        opened.wait(opened.ended)
        colours = "const style = getComputedStyle(arguments[0]); return [style.color, style.backgroundColor]"
        ink, ground = opened.driver.execute_script(colours, opened.one("body"))
        _, sheet = opened.driver.execute_script(colours, opened.one("#ask"))
        soft, _ = opened.driver.execute_script(colours, opened.one("#users-note"))
        bad, _ = opened.driver.execute_script(colours, opened.one("#error"))
        token, marked = opened.driver.execute_script(colours, opened.one(".token.moved"))
        label, button = opened.driver.execute_script(colours, opened.one("#ask .main"))
        for pair in (
            (ink, ground),
            (ink, sheet),
            (soft, sheet),
            (soft, ground),
            (bad, sheet),
            (token, marked),
            (label, button),
        ):
            assert readable(*pair) >= 4.5, pair
        assert (readable(ground, "rgb(255, 255, 255)") < 2) == (scheme == "light")
    finally:
        opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
