"""The live page in a real browser, by hand: what it shows under load is what /live.json says, and a picture to look at.

    tests/e2e/live_page.py PICTURE.png              # environment as in cluster.py; needs chromium

A server with two groups, requests that run, others that wait. The browser is driven over its debugging pipe: the page's own
script has polled a few times when its tiles, bars, map, histograms and table are read and compared.
"""
import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from cluster import Cluster, free_port, wait_for

READ = """JSON.stringify({
  texts: Object.fromEntries(["model", "state", "running", "waiting", "out", "in", "rate", "stepms", "most", "pages"].map(
    id => [id, document.getElementById(id).textContent])),
  bars: ["steps", "ttft", "tbt"].map(id => document.querySelectorAll(`#${id} rect`).length),
  map: document.querySelectorAll("#map i").length,
  rows: [...document.querySelectorAll("#groups tr")].map(r => [...r.children].map(c => c.textContent))})"""


class Browser:
    def __init__(self, profile):
        commands, self.to = os.pipe()
        self.answers, answers = os.pipe()

        def place():  # where --remote-debugging-pipe looks for them
            a, b = os.dup(commands), os.dup(answers)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self.process = subprocess.Popen(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=1200,1150",
             f"--user-data-dir={profile}"], preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.number, self.rest, self.session = 0, b"", None

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                data = os.read(self.answers, 1 << 20)
                if not data:
                    raise SystemExit("chromium ended")
                self.rest += data
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, url):
        target = self.call("Target.createTarget", url=url)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def page(self):
        """None: it is not loaded yet."""
        answer = self.call("Runtime.evaluate", expression=READ)
        return json.loads(answer["result"]["value"]) if "exceptionDetails" not in answer else None

    def picture(self, path):
        with open(path, "wb") as f:
            f.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def end(self):
        self.process.kill()
        self.process.wait()


def check(page, live):
    texts = page["texts"]
    for name, text in texts.items():
        if text in ("", "-") or "NaN" in text or "undefined" in text:
            raise SystemExit(f"{name} shows \"{text}\"")
    expected = {"state": "READY", "running": f"{live['running']} / {live['slots']}", "waiting": str(live["waiting"])}
    for name, text in expected.items():
        if texts[name] != text:
            raise SystemExit(f"{name} shows \"{texts[name]}\", /live.json says \"{text}\"")
    if float(texts["out"]) <= 0 or float(texts["stepms"]) <= 0:
        raise SystemExit(f"no answer tokens or no step time: {texts}")
    if min(page["bars"]) < 1 or page["map"] < 1:
        raise SystemExit(f"an empty picture: {page['bars']} bars, {page['map']} places of memory")
    groups = sum(1 + len(g["ranks"]) for g in live["groups"])
    if len(page["rows"]) != 1 + groups:
        raise SystemExit(f"{len(page['rows'])} rows of groups and ranks, expected {1 + groups}")


def main(path):
    port = free_port()
    args = ["--groups", 2, "--http", f"127.0.0.1:{port}", "--max-slots", 4, "--max-queued", 64]
    with Cluster(args=args) as c, tempfile.TemporaryDirectory() as profile:
        done = threading.Event()

        def client():
            while not done.is_set():
                c.run("Once upon a time", max_tokens=200, ignore_eos=True, temperature=1.0)

        clients = [threading.Thread(target=client) for _ in range(12)]
        for t in clients:
            t.start()
        browser = Browser(profile)
        try:
            browser.open(f"http://127.0.0.1:{port}/")

            def live():
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/live.json", timeout=10) as r:
                    return json.load(r)

            wait_for("rates on the page", lambda: (browser.page() or {"texts": {"rate": "-"}})["texts"]["rate"] != "-", 30)
            time.sleep(3)
            for left in range(20, -1, -1):  # the page is up to a second older
                page, now = browser.page(), live()
                try:
                    check(page, now)
                    break
                except SystemExit:
                    if left == 0:
                        raise
                    time.sleep(0.3)
            browser.picture(path)
        finally:
            done.set()
            browser.end()
            for t in clients:
                t.join()
        print(json.dumps(page["texts"]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
