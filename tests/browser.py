"""A stand-in for the service that says what a test wants, at the pace of the test, and its page in a real Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from pyargs.serve import page

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
WEIGHT = 2.0


class Service:
    """A stand-in for the service. asked: the bodies of calls, answered: what comes in a chunk each, for a user.

    open: answers go on beyond their first chunk. gone: users whose client has gone. error: (status, message) of all calls.
    """

    def __init__(self):
        self.users = ["ann", "bob", "cid"]
        self.fields, self.needs_user, self.keeps = ["strength", "reward_weight", "num_candidates", "min_p"], False, True
        self.asked: list[dict] = []
        self.pairs: dict[str, list[dict]] = {}
        self.adapted: set[str] = set()
        self.headers: list[dict] = []
        self.answered = {}
        self.logprobs = True
        self.gone: list[str | None] = []
        self.open = threading.Event()
        self.open.set()
        self.error: tuple[int, str] | None = None
        self.job = "done"
        self.sample: str | None = None
        self.polled = 0

    def tokens(self, user: str | None) -> list[str]:
        return self.answered.get(user, ["Dear", f" {user or 'all'}", ",", " hello."])

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page.router)

        @app.middleware("http")
        async def errors(request: Request, call_next):
            if request.url.path.startswith("/v1"):
                self.headers.append(dict(request.headers))
                if self.error:
                    status, message = self.error
                    return JSONResponse({"error": {"message": message}}, status, headers={"Retry-After": "7"})
            return await call_next(request)

        @app.get("/v1/models")
        def models():
            return {"data": [{"id": "tiny", "pyargs": {"fields": self.fields, "needs_user": self.needs_user}}]}

        @app.get("/v1/users")
        def users():
            told = [{"id": user, "source": "model", "adapted": None} for user in self.users]
            told += [{"id": user, "source": "pairs", "adapted": 1.0 if user in self.adapted else None} for user in self.pairs]
            return {"data": told, "has_more": False, "keeps": self.keeps}

        @app.post("/v1/users/{user:path}/pairs", status_code=202)
        async def pairs(user: str, request: Request):
            self.pairs[user] = (await request.json())["pairs"]
            return {"id": "job-1", "status": "queued"}

        @app.get("/v1/jobs/job-1")
        def job():
            self.polled += 1
            status = "running" if self.polled < 2 else self.job
            if status == "done":
                self.adapted.update(self.pairs)
            return {"id": "job-1", "status": status, "error": "its pairs are too long" if status == "failed" else None}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            body = await request.json()
            self.asked.append(body)
            return StreamingResponse(self.chunks(body), media_type="text/event-stream")

        return app

    async def chunks(self, body: dict):
        user, tokens = body.get("user"), self.tokens(body.get("user"))
        if "user" not in body and body["temperature"]:  # the samples of the form
            tokens = [self.sample or f"seed {body['seed']}"]
        try:
            for number, token in enumerate(tokens):
                while number and not self.open.is_set():
                    await asyncio.sleep(0.01)
                choice = {"delta": {"content": token}, "finish_reason": None, "pyargs": None}
                yield event([{**choice, "logprobs": {"content": [logprobs(token, user)]} if self.logprobs else None}])
            yield event([{"delta": {}, "logprobs": None, "finish_reason": "stop", "pyargs": {"reward_weight": WEIGHT}}])
            yield event([], {"completion_tokens": len(tokens)})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone.append(user)
            raise


def event(choices: list[dict], usage: dict | None = None) -> str:
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


def logprobs(token: str, user: str | None) -> dict:
    """For a user, the policy's favourite is another token than the one that the reward chose; both are candidates."""
    own = {"token": token, "logprob": -1.5, "reward": 1.25 if user else None}
    other = {"token": " else", "logprob": -0.5 if user else -3.0, "reward": 0.25 if user else None}
    both = sorted([own, other], key=lambda one: -one["logprob"])
    return {**own, "bytes": list(token.encode()), "top_logprobs": [{**one, "bytes": None} for one in both]}


@contextlib.contextmanager
def chromium(profile):
    """A browser without a window. profile: an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a test does in the page, and what is to be seen there."""

    def __init__(self, driver, address: str):
        self.driver, self.address = driver, address
        driver.set_window_size(1200, 900)
        driver.get_log("browser")
        driver.get(address)

    def all(self, css: str):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(node => node.checkVisibility() ? node.innerText : '')",
            css,
        )

    def wait(self, true) -> None:
        """Until true() is, which may look at what is gone in a moment."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(Exception):
                if true():
                    return
            time.sleep(0.02)
        raise AssertionError(f"not within a minute: {self.texts('body')}, {self.driver.get_log('browser')}")

    def loaded(self) -> Page:
        self.wait(lambda: len(self.all("#users input")) > 1)
        return self

    def pick(self, *users: str) -> None:
        for box in self.all("#users input"):
            if box.is_selected() != (box.get_attribute("value") in users):
                box.click()

    def ask(self) -> None:
        self.one("#ask .main").click()

    def ended(self) -> bool:
        return self.texts("#status") == ["All answers have ended."]

    def slide(self, value: float) -> None:
        slider = self.one("#strength")
        steps = round((value - float(slider.get_attribute("value"))) * 10)
        slider.send_keys((Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT) * abs(steps))

    def focused(self):
        return self.driver.switch_to.active_element

    def hover(self, node) -> None:
        webdriver.ActionChains(self.driver).move_to_element(node).perform()

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()
