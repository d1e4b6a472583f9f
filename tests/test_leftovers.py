"""What the suite ends after each test: the processes that the test started, and no others."""

import subprocess
import sys

import psutil
from conftest import leftovers


# starts a process of its own at the first line of its standard input, and prints its id
PARENT = """
import subprocess, sys
input()
print(subprocess.Popen([sys.executable, "-c", "input()"]).pid, flush=True)
input()
"""


def parent() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def child_of(process: subprocess.Popen) -> psutil.Process:
    process.stdin.write("\n")
    process.stdin.flush()
    return psutil.Process(int(process.stdout.readline()))


def test_a_browser_that_was_there_before_keeps_the_pages_it_opens():
    """Chromium's renderers were killed after the test that opened them, and the next test's tab had crashed."""
    with parent() as browser, parent() as other:
        try:
            before = set(psutil.Process().children()) - {psutil.Process(other.pid)}
            renderer, grandchild = child_of(browser), child_of(other)
            assert leftovers(before) == {psutil.Process(other.pid), grandchild}
            assert renderer.is_running()
        finally:
            for process in psutil.Process(browser.pid), psutil.Process(other.pid):
                for one in (*process.children(), process):
                    one.kill()
