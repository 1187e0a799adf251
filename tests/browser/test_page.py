"""The page of a trace in a headless Chromium: what it shows, and what a reader does to it.

Needs Debian's packages chromium and chromium-driver, or their like on PATH, and selenium.
"""

import json
import math
import shutil
import time

import numpy as np
import pytest

from bn_cy import reference
from bn_cy.graph import sequential, steps, trace
from bn_cy.graph.draw import PLACES

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

WIDE, NARROW = (1280, 800), (390, 844)
EPS = 0.25  # large enough that its place shows
MINUS = "\N{MINUS SIGN}"
MOMENTS = 22  # inputs, nine steps, the loss, nine steps back, two meetings
MISTAKES = {
    "1/n forgotten",
    "dx where dxhat belongs",
    "the sum without dout",
    "eps outside the root",
    "n-1 for n",
}


def executable(*names):
    """Find a program, and say which package has it."""
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.fail(f"none of {names} is on PATH: apt-get install chromium chromium-driver")
    return found[0]


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = executable("chromium", "chromium-browser", "google-chrome")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


def number(text):
    """Read a number as the page writes it."""
    return float(text.replace(MINUS, "-").replace("∞", "inf"))


class Page:
    """The page of a trace, as a reader has it before them."""

    def __init__(self, driver, folder):
        self.driver, self.folder, self.written = driver, folder, 0

    def open(self, t, fragment=""):
        """Write the page of a trace and open it from the disk."""
        self.written += 1
        path = self.folder / f"page{self.written}.html"
        t.to_html(path)
        self.url = path.as_uri()
        self.driver.get(self.url + fragment)
        return self

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition):
        return WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition())

    def emulate(self, size=WIDE, **media):
        width, height = size
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": size == NARROW,
        }
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        # Scrolling that takes no time.
        features = {"prefers-reduced-motion": "reduce", "prefers-color-scheme": "light"} | media
        kind = features.pop("kind", "")
        listed = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": kind, "features": listed}
        )

    def go(self, scene):
        self.run("go(arguments[0])", scene)
        self.wait(lambda: self.run("return scrollingTo === null"))
        assert self.scene() == scene

    def scene(self):
        return self.run("return state.scene")

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def entry(self, name, i, f):
        return self.find(f'.hero input[data-name="{name}"][data-i="{i}"][data-f="{f}"]')

    def type(self, field, text):
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def results(self):
        return {name: np.array(value) for name, value in self.run("return results").items()}

    def numbers(self):
        """The arrays that the page says it holds."""
        numbers = self.run("return state.numbers")
        return {name: np.array(value) for name, value in numbers.items()}

    def follow(self, i, f):
        for key, value in (("i", i), ("f", f)):
            self.find(f'[data-entry="{key}"] option[value="{value}"]').click()


@pytest.fixture
def page(driver, tmp_path):
    page = Page(driver, tmp_path)
    page.emulate()
    driver.get_log("browser")
    driver.get_log("performance")
    yield page
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    assert not complaints


def problem(rng, shape=(5, 3), dtype=np.float64):
    x, dout = (rng.normal(size=(2, *shape)) + 0.3).astype(dtype)
    gamma, beta = (rng.uniform(0.5, 2, (2, shape[1]))).astype(dtype)
    return x, gamma, beta, dout


def random_trace(rng, shape=(5, 3), dtype=np.float64):
    return trace(*problem(rng, shape, dtype), EPS)


def cache_of(x, gamma, beta, dout, eps=EPS):
    cache = reference.staged_forward(x, gamma, beta, eps)[1]
    reference.staged_backward(dout, cache)
    return cache


def assert_close_to_reference(page, **given):
    """Compare everything the page has computed with the reference, to 1e-12."""
    numbers = page.numbers() | given
    arrays = [numbers[name] for name in ("x", "gamma", "beta", "dout")]
    cache, results = cache_of(*arrays, float(numbers["eps"])), page.results()
    assert results.keys() == cache.keys() - {"axis"} | {"eps"}
    for name in results.keys() - {"eps"}:
        scale = max(1, np.abs(cache[name]).max())
        np.testing.assert_allclose(
            results[name], cache[name], rtol=0, atol=1e-12 * scale, err_msg=name
        )


# Numbers


@pytest.mark.parametrize("shape", [(5, 3), (2, 1), (9, 4), (64, 16)])
def test_numbers_are_those_of_the_reference(page, rng, shape):
    t = random_trace(rng, shape)
    page.open(t)
    np.testing.assert_array_equal(page.numbers()["x"], t.nodes["x"].value)
    assert_close_to_reference(page)


def test_other_layouts_become_rows_of_examples(page, rng):
    x, gamma, beta, dout = problem(rng, (6, 2))
    page.open(trace(x.T, gamma, beta, dout.T, EPS, axis=0))
    assert_close_to_reference(page, x=x, dout=dout)
    images = [array.reshape(2, 3, 2).transpose(0, 2, 1) for array in (x, dout)]
    page.open(trace(images[0], gamma, beta, images[1], EPS))
    assert_close_to_reference(page, x=x, dout=dout)


def bits(array):
    return np.ascontiguousarray(array).view(np.int32)


@pytest.mark.parametrize("shape", [(5, 3), (33, 6)])
def test_float32_is_that_of_numpy_to_the_bit(page, rng, shape):
    t = random_trace(rng, shape)
    page.open(t)
    page.find('.hero [data-switch="float32"]').click()
    arrays = [node.value.astype(np.float32) for node in t.nodes[:3]]
    expected = sequential.steps(*arrays, t.dout.astype(np.float32), EPS)
    results = page.results()
    for name, value in expected.items():
        single = results[name].astype(np.float32)
        np.testing.assert_array_equal(single, results[name], name)  # it is a float32
        np.testing.assert_array_equal(bits(single), bits(value), name)


def test_a_float32_trace_opens_in_float32(page, rng):
    t = random_trace(rng, dtype=np.float32)
    page.open(t)
    assert page.find('[data-switch="float32"]').is_selected()
    expected = sequential.steps(*(node.value for node in t.nodes[:3]), t.dout, EPS)
    np.testing.assert_array_equal(page.results()["dx"], expected["dx"])
    page.find('[data-switch="float32"]').click()
    page.wait(lambda: "float32=0" in page.driver.current_url)
    page.driver.refresh()
    assert not page.find('[data-switch="float32"]').is_selected()


def test_variances_are_those_of_numpy_to_the_bit(page, rng):
    t = random_trace(rng, (12, 3))
    page.open(t)
    x = t.nodes["x"].value.astype(np.float32)
    for exponent in (0, 2.5, 4, 6, 7):
        offset = np.float32(page.run("return 10 ** arguments[0]", exponent))
        got = page.run("return variancesAt(state.numbers.x, 10 ** arguments[0]).computed", exponent)
        for name, value in sequential.variances(x + offset).items():
            np.testing.assert_array_equal(np.array(got[name]), value, name)


def test_offset_kills_one_pass_first_and_leaves_the_shifted_sum(page, rng):
    page.open(random_trace(rng, (12, 3)))

    def errors(exponent):
        script = "const s = document.querySelector('[data-offset]'); s.value = arguments[0];"
        page.run(script + "s.dispatchEvent(new Event('input', {bubbles: true}))", exponent)
        rows = page.all("[data-variance]")
        cells = [row.get_attribute("innerText").split("\t") for row in rows]
        return [number(cell[-1]) for cell in cells]

    one_pass, two_pass, shifted = errors(0)
    assert max(one_pass, two_pass, shifted) < 1e-5
    one_pass, two_pass, shifted = errors(4)
    assert one_pass > 1e-3 > two_pass
    one_pass, two_pass, shifted = errors(6)
    assert shifted < 1e-6 < one_pass
    assert page.find("[data-offset-value]").text == "1e6"


@pytest.mark.parametrize("switch", [None, "ones", "float32"])
def test_every_gradient_is_checked_in_front_of_the_reader(page, rng, switch):
    t = random_trace(rng)
    page.open(t)
    if switch:
        page.find(f'.hero [data-switch="{switch}"]').click()
    page.go(MOMENTS - 1)
    values = {node.name: node.value for node in t.nodes} | {"eps": EPS}
    dout = np.ones_like(t.dout) if switch == "ones" else t.dout
    differences = page.run("return differences")
    for name in steps.INPUTS + tuple(step.name for step in steps.STEPS):
        numeric = steps.numeric_gradient(name, values, dout)
        tolerance = 1e-3 if switch == "float32" else 1e-9
        np.testing.assert_allclose(differences[name], numeric, rtol=tolerance, atol=tolerance)
        check = page.find(f'[data-node="{name}"] .check').text
        assert check.startswith("✓"), (name, check)
        distance = number(check[2:])
        assert distance <= (1e-4 if switch == "float32" else 1e-9)


# Steps


TEXTS = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"


def shown(page):
    """What stands on the wires: (values, names of gradients)."""
    return [
        [text for text in page.run(TEXTS, selector) if text]
        for selector in (".wire text.forward", ".wire text.name")
    ]


def test_steps_show_what_has_passed_and_no_more(page, rng):
    page.open(random_trace(rng))
    order = [[wire.gradient for wire in step.wires] for step in reversed(steps.STEPS)]
    for scene in range(MOMENTS):
        page.go(scene)
        values, gradients = shown(page)
        forward = [len(step.wires) for step in steps.STEPS[:scene]]
        assert len(values) == sum(forward) + 1  # and the legend
        known = {"dout"} if scene >= 10 else set()
        meetings = sum(scene >= moment for moment in (18,))
        for names in order[: max(0, scene - 10 - meetings)]:
            known |= set(names)
        assert set(gradients) == known, scene
        lit = [node.get_attribute("data-node") for node in page.all(".node.meeting")]
        assert lit == {18: ["xmu"], 21: ["x"]}.get(scene, []), scene


def test_buttons_arrow_keys_and_slider_step(page, rng):
    page.open(random_trace(rng))
    back, forward = page.find('[data-go="-1"]'), page.find('[data-go="1"]')
    assert not back.is_enabled()
    forward.click()
    assert page.scene() == 1
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.scene() == 3
    page.press(Keys.ARROW_LEFT)
    assert page.scene() == 2
    back.click()
    assert page.scene() == 1
    page.find("[data-scrub]").send_keys(Keys.END)
    assert page.scene() == len(page.all(".scene")) - 1
    assert not forward.is_enabled()


SCROLL = """
const [top, done] = arguments;
scrollTo(0, top);
requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)));
"""


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_scrolling_alone_tells_the_whole_lesson(page, rng, size):
    page.emulate(size)
    page.open(random_trace(rng))
    told = [page.scene()]
    bottom = page.run("return document.documentElement.scrollHeight - innerHeight")
    for top in np.linspace(0, bottom, 160):
        page.driver.execute_async_script(SCROLL, float(top))
        if page.scene() != told[-1]:
            told.append(page.scene())
    assert told == list(range(len(page.all(".scene"))))


def test_status_is_announced(page, rng):
    page.open(random_trace(rng))
    status = page.find('[role="status"]')
    assert status.get_attribute("aria-live") == "polite"
    page.go(13)
    assert "Backward, step 7: dxmu1 = dxhat * ivar, divar = sum(dxhat * xmu)" in status.text
    page.go(18)
    assert "Two gradients meet at xmu and add: dxmu = dxmu1 + dxmu2" in status.text


def test_steps_are_told_with_the_numbers_of_the_entry_followed(page, rng):
    t = random_trace(rng)
    page.open(t)
    page.follow(2, 1)
    for name in ("mu", "xmu", "var", "xhat", "dgamma", "divar", "dxmu", "dmu", "dx"):
        text = page.find(f'[data-live="{name}"]').get_attribute("textContent")
        array = page.results()[name]
        value = array[2, 1] if array.ndim == 2 else array[1]
        assert text.startswith(f"{name}[2, 1] = " if array.ndim == 2 else f"{name}[1] = ")
        assert number(text.split(" = ")[-1]) == pytest.approx(value, rel=6e-3, abs=6e-4)


# Edits


def test_a_typed_number_changes_everything(page, rng):
    page.open(random_trace(rng))
    for name, i, f, text in [
        ("x", 3, 2, "-1.75"),
        ("dout", 0, 1, "2.5"),
        ("gamma", 0, 2, f"{MINUS}0.5"),
        ("beta", 0, 0, "7"),
    ]:
        page.type(page.entry(name, i, f), text)
        assert page.numbers()[name].reshape(-1, 3)[i, f] == number(text)
        assert_close_to_reference(page)
        assert page.run("return [state.f, state.i]")[0] == f  # it is followed
    page.type(page.entry("eps", 0, 0), "0.5")
    assert_close_to_reference(page, eps=0.5)


def test_what_is_no_number_is_marked_and_not_taken(page, rng):
    page.open(random_trace(rng))
    before = page.numbers()["x"]
    field = page.entry("x", 0, 0)
    page.type(field, "1.5e")
    assert field.get_attribute("aria-invalid") == "true"
    page.press(Keys.TAB)
    assert float(field.get_attribute("value")) == page.numbers()["x"][0, 0]
    np.testing.assert_array_equal(page.numbers()["x"][1:], before[1:])
    page.type(page.entry("eps", 0, 0), "-1")
    assert page.numbers()["eps"] >= 0


def test_dragging_changes_a_number(page, rng):
    page.open(random_trace(rng))
    before = page.numbers()["x"]
    ActionChains(page.driver).drag_and_drop_by_offset(page.entry("x", 1, 1), 60, 0).perform()
    after = page.numbers()["x"]
    assert after[1, 1] > before[1, 1]
    assert (after != before).sum() == 1
    assert_close_to_reference(page)


def test_arrow_keys_change_a_number_and_do_not_step(page, rng):
    page.open(random_trace(rng))
    before = page.numbers()["gamma"]
    page.entry("gamma", 0, 1).click()
    page.press(Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    after = page.numbers()["gamma"]
    assert after[1] > before[1]
    assert page.scene() == 0
    assert_close_to_reference(page)


PASTE = """
const data = new DataTransfer();
data.setData("text", arguments[1]);
arguments[0].dispatchEvent(
  new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
"""


@pytest.mark.parametrize(
    "text",
    [
        "1\t2\n3\t-4\n0.5\t6e-1\n",
        "[[1, 2],\n [3, -4],\n [0.5, 0.6]]",
        f"array([[1., 2.], [3., {MINUS}4.], [0.5, 0.6]])",
        "1 2; 3 -4; .5 .6",
    ],
)
def test_a_pasted_matrix_replaces_the_batch(page, rng, text):
    page.open(random_trace(rng))
    page.run(PASTE, page.entry("x", 4, 2), text)
    np.testing.assert_array_equal(page.numbers()["x"], [[1, 2], [3, -4], [0.5, 0.6]])
    assert len(page.all('.hero input[data-name="dout"]')) == 6
    assert_close_to_reference(page)


def test_a_matrix_can_be_pasted_into_the_text_area(page, rng):
    page.open(random_trace(rng))
    page.find(".paste summary").click()
    page.find(".paste textarea").send_keys("0.5 -2 1.5")
    page.find(".paste option:nth-child(3)").click()
    page.find(".paste button").click()
    np.testing.assert_array_equal(page.numbers()["gamma"], [0.5, -2, 1.5])
    assert_close_to_reference(page)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 2\n3", "its rows are not of one length"),
        ("1 two\n3 4", "“two” is no number"),
        ("\n".join(["1 2"] * 65), "up to 64 examples of 16 features"),
    ],
)
def test_a_bad_matrix_is_refused_and_said_so(page, rng, text, why):
    page.open(random_trace(rng))
    before = page.numbers()["x"]
    page.run(PASTE, page.entry("x", 0, 0), text)
    note = page.find("[data-note]")
    assert why in note.text
    assert note.get_attribute("aria-live") == "polite"
    np.testing.assert_array_equal(page.numbers()["x"], before)


def test_start_again_brings_the_numbers_back(page, rng):
    t = random_trace(rng)
    page.open(t)
    page.type(page.entry("x", 0, 0), "9")
    page.run("document.querySelector('[data-reset]').click()")
    np.testing.assert_array_equal(page.numbers()["x"], t.nodes["x"].value)


# The link


def state_of(page):
    state = page.run("return state")
    return json.dumps(state, sort_keys=True)


def test_a_link_holds_the_whole_state(page, rng):
    page.open(random_trace(rng))
    page.run(PASTE, page.entry("x", 0, 0), "0.1 0.2\n0.3 1e-17\n1234.5 -7")
    page.type(page.entry("eps", 0, 0), "0.125")
    page.follow(2, 1)
    page.find('.hero [data-switch="ones"]').click()
    page.find('.hero [data-switch="float32"]').click()
    page.go(15)
    page.find('[data-node="var"]').click()
    page.find('[data-hide="var"]').click()
    page.run("change({offset: 5.5})")
    page.wait(lambda: "offset=5.5" in page.driver.current_url)
    kept, link = state_of(page), page.driver.current_url
    page.driver.get("about:blank")
    page.driver.get(link)
    assert state_of(page) == kept
    assert page.find(".scene.current [data-live]").is_displayed()
    assert page.run("return sceneInView()") == 15


def test_a_link_followed_in_the_open_page(page, rng):
    page.open(random_trace(rng))
    page.run("location.hash = '#x=1,2;3,5;4,4&gamma=1,2&beta=0,0&dout=1,0;0,1;2,2&eps=0.5&scene=3'")
    page.wait(lambda: page.scene() == 3)
    np.testing.assert_array_equal(page.numbers()["x"], [[1, 2], [3, 5], [4, 4]])
    assert_close_to_reference(page, eps=0.5)


@pytest.mark.parametrize(
    "fragment",
    ["#x=1,2;3", "#at=99,-1&scene=1e9&node=nobody&hide=x2", "#%E0%A4%A", "#eps=-1&offset=abc"],
)
def test_a_broken_link_is_read_as_far_as_it_makes_sense(page, rng, fragment):
    t = random_trace(rng)
    page.open(t, fragment)
    np.testing.assert_array_equal(page.numbers()["x"], t.nodes["x"].value)
    assert_close_to_reference(page)


def test_a_page_written_anew_shows_its_own_numbers(page, rng):
    t = random_trace(rng)
    page.open(t)
    page.go(4)
    page.wait(lambda: "scene=4" in page.driver.current_url)
    assert "x=" not in page.driver.current_url
    page.run("save(true)")
    assert "x=" in page.driver.current_url


# Predictions


def mistaken(name, x, gamma, beta, dout):
    """Compute everything with a mistake, apart from the page's code."""
    n, c = len(x), cache_of(x, gamma, beta, dout)
    less = n - 1 if name == "n-1 for n" else n
    count = 1 if name == "1/n forgotten" else n
    var = c["sq"].sum(axis=0) / min(count, less)
    outside = name == "eps outside the root"
    s = np.sqrt(c["var"]) + EPS if outside else np.sqrt(var + EPS)
    if name == "1/n forgotten":
        s = c["sqrtvar"]
    xhat = c["xmu"] / s
    start = c["dx"] if name == "dx where dxhat belongs" else gamma * dout
    lost = name == "the sum without dout"
    dgamma = xhat.sum(axis=0) if lost else (dout * xhat).sum(axis=0)
    dvar = -0.5 * (0 * c["xmu"] if lost else start * c["xmu"]).sum(axis=0) / s**3
    dmean = -(start / s).sum(axis=0)
    dx = gamma * dout / s + 2 * c["xmu"] * dvar / min(count, less) + dmean / count
    return {"var": var, "dgamma": dgamma, "dvar": dvar, "dx": dx}


WHERE = {
    "1/n forgotten": ["var", "dx"],
    "dx where dxhat belongs": ["dvar", "dx"],
    "the sum without dout": ["dgamma", "dvar", "dx"],
    "eps outside the root": ["dgamma", "dvar", "dx"],
    "n-1 for n": ["var", "dgamma", "dvar", "dx"],
}
CASES = [(name, target) for name, targets in WHERE.items() for target in targets]


def predict(page, target, text):
    form = page.find(f'[data-predict="{target}"] form')
    field = form.find_element("css selector", "input")
    page.run("arguments[0].scrollIntoView({block: 'center'})", field)
    page.type(field, text)
    field.send_keys(Keys.ENTER)
    return form.find_element("css selector", "output").text


def at(array, i, f):
    return float(array[i, f] if array.ndim == 2 else array[f])


def farthest(typed, known):
    """Give (i, f) of the entry at which a number is least like every other that the page knows."""
    known = np.array(known)
    apart = (np.abs(known - typed) / (np.abs(known) + np.abs(typed))).min(axis=0)
    return (0, *np.unravel_index(np.argmax(apart), apart.shape))[-2:]


def known_mistakes(target, arrays):
    return [mistaken(name, *arrays)[target] for name in WHERE if target in WHERE[name]]


def test_all_mistakes_are_tested():
    assert WHERE.keys() == MISTAKES


@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_mistake_is_told_by_its_name(page, rng, name, target):
    arrays = problem(rng)
    page.open(trace(*arrays, EPS))
    right, wrong = cache_of(*arrays)[target], mistaken(name, *arrays)[target]
    # Where the mistake changes most: elsewhere it may not matter.
    i, f = farthest(wrong, [right])
    page.follow(i, f)
    verdict = predict(page, target, f"{at(wrong, i, f):.6g}")
    assert name in verdict
    assert "Right" not in verdict


@pytest.mark.parametrize("target", ["var", "dgamma", "dvar", "dx"])
def test_what_is_right_is_told_so(page, rng, target):
    arrays = problem(rng)
    page.open(trace(*arrays, EPS))
    cache = cache_of(*arrays)
    parts = [cache["dx1"], cache["dx2"]] if target == "dx" else []
    i, f = farthest(-cache[target], [*known_mistakes(target, arrays), *parts])
    page.follow(i, f)
    value = at(cache[target], i, f)
    for text in (f"{value:.3g}", f"{value:.10g}", f"{value:.4g}".replace("-", MINUS)):
        assert predict(page, target, text).startswith("Right.")
    # No mistake makes a number a million times larger.
    wrong = predict(page, target, f"{1e6 * (1 + abs(value)):.8g}")
    assert "none of the mistakes known here" in wrong
    assert "Type a number" in predict(page, target, "much")
    assert "the sign is not" in predict(page, target, f"{-value:.8g}")


def test_half_of_a_sum_is_recognized(page, rng):
    arrays = problem(rng)
    page.open(trace(*arrays, EPS))
    cache = cache_of(*arrays)
    part = cache["dx2"]
    i, f = farthest(part, [cache["dx"], cache["dx1"], *known_mistakes("dx", arrays)])
    page.follow(i, f)
    assert "That is dx2 alone" in predict(page, "dx", f"{at(part, i, f):.8g}")


def test_numbers_to_be_predicted_are_not_shown_before(page, rng):
    page.open(random_trace(rng))
    for target in ("var", "dgamma", "dvar", "dx"):
        form = page.find(f'[data-predict="{target}"]')
        scene = page.run("return scenes.indexOf(arguments[0].closest('.scene'))", form)
        page.go(scene)
        assert not page.find(f'[data-live="{target}"]').is_displayed()
        page.go(scene + 1)
        assert page.find(f'[data-live="{target}"]').is_displayed()


def test_a_node_can_be_hidden_and_predicted(page, rng):
    arrays = problem(rng)
    page.open(trace(*arrays, EPS))
    page.follow(2, 1)
    page.go(MOMENTS - 1)
    page.find('[data-node="xhat"]').click()
    page.find('[data-hide="dxhat"]').click()

    def cells(caption):
        figures = {figure.text.split()[0]: figure for figure in page.all(".inspector figure")}
        return {cell.text for cell in figures[caption].find_elements("css selector", "td")}

    assert cells("dxhat") == cells("by") == {"?"}
    assert "?" not in cells("xhat")
    (wire,) = [wire for wire in page.all(".wire") if "dxhat" in wire.text.split()]
    assert wire.text.split()[-1] == "?"
    assert page.find('[data-node="xhat"] .thumb:nth-of-type(2) text').text == "?"
    assert "gradient ?" in page.find('[data-node="xhat"]').get_attribute("aria-label")
    for name in ("dxhat", "dxmu1", "divar"):  # what is computed from it would tell
        assert (
            page.find(f'[data-live="{name}"]')
            .get_attribute("textContent")
            .startswith("dxhat is hidden")
        )
    value = at(cache_of(*arrays)["dxhat"], 2, 1)
    page.find(".inspector .predict input").send_keys(f"{value:.4g}", Keys.ENTER)
    assert page.find(".inspector output").text.startswith("Right.")
    page.find(".inspector [data-show]").click()
    assert "?" not in cells("dxhat") | cells("by")


# Nodes, paths, exhibits


def test_a_click_on_a_node_shows_formula_derivatives_and_tables(page, rng):
    t = random_trace(rng)
    page.open(t)
    page.go(MOMENTS - 1)
    for step in steps.STEPS:
        page.run("drawing.choose(arguments[0])", step.name)
        inspector = page.find(".inspector")
        labels = [math.get_attribute("aria-label") for math in page.all(".inspector math")]
        assert f"{step.name} = {step.formula}" in labels
        for wire in step.wires:
            assert f"d {step.name} / d {wire.source} = {wire.local}" in labels
            assert f"{wire.gradient} = {wire.rule}" in labels
        captions = [caption.text for caption in page.all(".inspector figcaption")]
        assert {step.name, f"d{step.name}", "by differences"} <= set(captions)
        distance = float(page.find(".inspector [data-distance]").get_attribute("data-distance"))
        assert 0 <= distance < 1e-9
        assert "✓" in inspector.text


def test_formulas_are_typeset(page, rng):
    page.open(random_trace(rng))
    markup = page.run("return mathML('dvar = dsqrtvar/(2*sqrtvar)')")
    assert markup.count("<mfrac>") == 1
    assert "(" not in markup
    root = page.run("return mathML('sqrtvar = sqrt(var + eps)')")
    assert "<msqrt>" in root
    assert "ε" in root
    assert "∑" in page.run("return mathML('mu = sum(x)/n')")
    assert "<msup>" in page.run("return mathML('-divar/sqrtvar**2')")
    line, fraction = (
        page.find(f'.formula[data-math="{formula}"] math').size["height"]
        for formula in ("xmu = x - mu", "var = sum(sq)/n")
    )
    assert fraction > 1.5 * line > 0  # laid out


def test_three_bars_add_up(page, rng):
    t = random_trace(rng)
    page.open(t)
    for i, f in ((0, 0), (4, 2)):
        page.follow(i, f)
        label = page.find('[data-bars="all"] svg').get_attribute("aria-label").replace(MINUS, "-")
        parts = {word.split()[0]: float(word.split()[1]) for word in label.split(", ")}
        expected = t.paths(i, f)
        for way in ("direct", "mean", "variance"):
            assert parts[way] == pytest.approx(getattr(expected, way), rel=6e-3, abs=6e-4)
        assert parts["dx"] == pytest.approx(sum(expected), rel=6e-3, abs=6e-4)
        exact = page.run("return paths(results, state.i, state.f)")
        assert sum(exact.values()) == pytest.approx(t.dx[i, f], abs=1e-12)


@pytest.mark.parametrize(
    ("light", "on"),
    [
        ("direct", {"dgammax", "dxhat", "dxmu1", "dx1"}),
        ("mean", {"dgammax", "dxhat", "dxmu1", "dmu", "dx2"}),
        ("variance", {"dgammax", "dxhat", "divar", "dsqrtvar", "dvar", "dsq", "dxmu2", "dx1"}),
    ],
)
def test_a_path_lights_up(page, rng, light, on):
    page.open(random_trace(rng))
    page.go(page.run(f"return scenes.findIndex(s => s.dataset.light === '{light}')"))
    assert set(page.run(TEXTS, ".lit .wire.on .name")) == on


def test_rows_of_the_jacobian_sum_to_zero(page, rng):
    t = random_trace(rng)
    page.open(t)
    page.follow(3, 2)
    J = np.array(page.run("return jacobian(results, state.f)"))
    expected = reference.jacobian(t.nodes["x"].value[:, 2], t.nodes["gamma"].value[2], EPS)
    np.testing.assert_allclose(J, expected, rtol=0, atol=1e-13)
    assert np.abs(J.sum(axis=1)).max() < 1e-14
    assert len(page.all("[data-jacobian] td span")) == 25
    assert number(page.find("[data-rowsum]").get_attribute("textContent")) < 1e-14


def verdicts(page):
    rows = page.all("[data-mistakes] tr[data-mistake]")
    cells = "return arguments[0].lastElementChild.textContent"
    return {row.get_attribute("data-mistake"): page.run(cells, row) for row in rows}


def test_wrong_formulas_pass_where_dout_is_ones(page, rng):
    page.open(random_trace(rng))
    assert verdicts(page) == {"no mistake": "passes"} | dict.fromkeys(MISTAKES, "found")
    page.find('.hero [data-switch="ones"]').click()
    passing = {name for name, verdict in verdicts(page).items() if verdict == "passes"}
    assert passing == {"no mistake", "the sum without dout", "eps outside the root", "n-1 for n"}
    assert all(switch.is_selected() for switch in page.all('[data-switch="ones"]'))
    assert not page.entry("dout", 0, 0).is_enabled()
    np.testing.assert_array_equal(page.results()["dout"], np.ones((5, 3)))
    assert_close_to_reference(page, dout=np.ones((5, 3)))


# For everybody


def test_nodes_are_opened_and_closed_by_keyboard(page, rng):
    page.open(random_trace(rng))
    page.go(12)
    page.run("document.querySelector('[data-node=\"gamma\"]').focus()")
    page.press(Keys.ENTER)
    assert page.find(".inspector h2").text == "gamma"
    assert page.run("return document.activeElement.dataset.node") == "gamma"  # the focus stays
    page.press(Keys.ARROW_RIGHT)
    assert page.scene() == 13
    assert page.run("return document.activeElement.dataset.node") == "gamma"
    page.press(Keys.ESCAPE)
    assert page.run("return state.node") == ""


def test_the_whole_page_is_reached_by_tab(page, rng):
    page.open(random_trace(rng))
    names = "const e = document.activeElement; return e.dataset.node ?? e.dataset.name ?? e.tagName"
    reached = []
    while len(reached) < 30 or reached[-1] != "BODY":
        page.press(Keys.TAB)
        reached.append(page.run(names))
        assert len(reached) < 200
    nodes = [name for name in reached[reached.index("INPUT") :] if page.all(f"[data-node={name}]")]
    assert sorted(nodes) == sorted(PLACES)
    assert reached.index("x") < reached.index("dout") < reached.index("gamma") < reached.index("mu")


def test_every_control_has_a_name(page, rng):
    page.open(random_trace(rng))
    page.go(MOMENTS - 1)
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {
        "button",
        "textbox",
        "slider",
        "switch",
        "combobox",
        "checkbox",
        "img",
        "region",
        "status",
    }
    controls = [
        node for node in tree if node.get("role", {}).get("value") in roles and not node["ignored"]
    ]
    assert len(controls) > 60
    unnamed = [node["role"]["value"] for node in controls if not node.get("name", {}).get("value")]
    assert unnamed == ["status"] * len(unnamed)
    names = {node["name"]["value"] for node in controls if "name" in node}
    assert "x, example 0, feature 2" in names
    assert any(name.startswith("xhat = xmu * ivar, xhat[1, 0] is ") for name in names)


CONTRAST = """
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
const context = canvas.getContext("2d", {willReadFrequently: true});
const rgb = (colour) => {
  context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = colour.map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const colour = rgb(getComputedStyle(element).backgroundColor);
    if (colour[3] === 255) return colour;
  }
};
const all = [...document.querySelectorAll(arguments[0])];
return all.filter((element) => element.getClientRects().length).map((element) => {
  const {fill, color} = getComputedStyle(element);
  const colour = rgb(element instanceof SVGElement ? fill : color);
  const [a, b] = [light(colour), light(ground(element))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
          element.textContent || element.value || ""];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page, rng, scheme):
    page.emulate(**{"prefers-color-scheme": scheme})
    page.open(random_trace(rng))
    page.go(MOMENTS - 1)
    selector = (
        "p, h1, h2, h3, button:enabled, figcaption, figcaption small, td > span, td > input, th, "
        ".wire text, .good, .bad, .way"
    )
    worst = min(page.run(CONTRAST, selector))
    assert worst[0] >= 4.5, worst
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(21, 23, 27)") == (scheme == "dark")


@pytest.mark.parametrize("size", [NARROW, (768, 1024), WIDE, (1920, 1080)])
def test_nothing_sticks_out_of_the_window(page, rng, size):
    page.emulate(size)
    page.open(random_trace(rng, (5, 3)))
    for scene in range(0, len(page.all(".scene")), 3):
        page.go(scene)
        assert page.run("return document.documentElement.scrollWidth") <= size[0]
    for box in page.all(".node .box"):
        assert box.rect["x"] >= 0
        assert box.rect["x"] + box.rect["width"] <= size[0]


def test_a_node_opens_a_sheet_where_it_is_narrow(page, rng):
    page.emulate(NARROW)
    page.open(random_trace(rng))
    page.go(12)
    assert not page.find(".inspector").is_displayed()
    page.find('[data-node="xhat"]').click()
    assert page.find(".inspector").is_displayed()
    page.find("[data-close]").click()
    assert not page.find(".inspector").is_displayed()


def test_print_has_the_whole_graph_and_no_controls(page, rng):
    page.open(random_trace(rng))
    page.emulate(kind="print")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert len(shown(page)[1]) == 14
    for selector in (".toolbar", ".predict", "[data-go]", ".switch"):
        assert not any(element.is_displayed() for element in page.all(selector))
    assert all(live.is_displayed() for live in page.all("[data-live]"))


def test_nothing_is_fetched(page, rng):
    page.open(random_trace(rng))
    for scene in range(0, len(page.all(".scene")), 4):
        page.go(scene)
    time.sleep(0.2)
    events = [
        json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")
    ]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls
    assert {url.split("#")[0] for url in urls if not url.startswith("data:")} == {page.url}


def test_a_constant_column_without_eps_is_shown_as_it_is(page, rng):
    page.open(random_trace(rng, (4, 2)))
    page.run(PASTE, page.entry("x", 0, 0), "1 2\n1 3\n1 5\n1 4")
    page.type(page.entry("eps", 0, 0), "0")
    page.go(MOMENTS - 1)
    assert page.find('[data-node="ivar"]').get_attribute("aria-label").count("∞") == 1
    assert math.isfinite(page.run("return results.dx[0][1]"))
