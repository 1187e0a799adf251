// The page: its state, what is shown of it, and what the reader does to it.
"use strict";

const GRAPH = JSON.parse(document.getElementById("graph").textContent);
const MOMENTS = momentsOf(GRAPH);
const TIMES = timetable(GRAPH, MOMENTS);
const STEP_OF = Object.fromEntries(GRAPH.nodes.map((node) => [node.name, node.step]));

const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];
const scenes = findAll(".scene");

const initial = {
  numbers: GRAPH.numbers, i: Math.min(1, GRAPH.numbers.x.length - 1), f: 0,
  scene: 0, node: "", hide: "", ones: false, float32: GRAPH.float32, offset: 3,
};
let state = fromFragment(location.hash, initial);
let results, differences;
let computed = {}; // the part of the state that they were computed from

const drawing = new Drawing(find(".drawing"), GRAPH, (name) => change({ node: state.node === name ? "" : name, hide: "" }));
const narrow = matchMedia("(max-width: 61.99rem)");

// --- computing -----------------------------------------------------------------------------------

function numbersInUse() {
  const ones = state.numbers.dout.map((row) => row.map(() => 1));
  return state.ones ? { ...state.numbers, dout: ones } : state.numbers;
}

function compute() {
  const { numbers, ones, float32 } = state;
  if (computed.numbers === numbers && computed.ones === ones && computed.float32 === float32) return;
  computed = { numbers, ones, float32 };
  results = steps(numbersInUse(), state.float32 ? single : double);
  differences = Object.fromEntries(GRAPH.nodes.map(({ name }) => [name, numericGradient(GRAPH, name, results)]));
}

// --- the view ------------------------------------------------------------------------------------

const moment = () => Number(scenes[state.scene].dataset.moment);
// After the last moment nothing moves: the exhibits have the word.
const quiet = () => state.scene >= MOMENTS.length;
const light = () => scenes[state.scene].dataset.light ?? "";
const entryOf = (name) => (isMatrix(results[name]) ? results[name][state.i][state.f] : results[name][state.f]);
const entryName = (name) => `${name}[${isMatrix(results[name]) ? `${state.i}, ` : ""}${state.f}]`;
const show = (name, digits = 3) => (isHidden(name) ? "?" : format(entryOf(name), digits));
// What is hidden is hidden under its other name, too: a sum passes its gradient on unchanged.
const isHidden = (name) => state.hide !== "" && (name === state.hide || aliases(state.hide).includes(name));
const aliases = (name) => ({ dxmu: ["dx1"], dout: ["dgammax"], dgammax: ["dout"], dx1: ["dxmu"] })[name] ?? [];

function nodeError(name) {
  const gradient = results[`d${name}`];
  const bad = !agrees(gradient, differences[name], state.float32 ? 1e-3 : 1e-6);
  return { distance: distance(gradient, differences[name]), bad };
}

// Whether something passes along a wire at this very moment.
function moves(wire, direction, { kind, node }) {
  if (direction === "forward") return kind === "forward" && wire.target === node;
  if (kind === "meet") return wire.source === node;
  if (kind === "loss") return wire.gradient === "dout";
  return kind === "backward" && wire.target === node;
}

function currentView() {
  const now = moment(), { kind, node } = MOMENTS[now];
  return {
    results, i: state.i, f: state.f, hide: state.hide, light: light(), show, error: nodeError,
    passed: (wire) => now >= TIMES.value[wire.target],
    cameBack: (gradient) => now >= TIMES.wire[gradient],
    known: (name) => now >= TIMES.value[name],
    arrived: (name) => now >= TIMES.gradient[name],
    now: (wire, direction) => !quiet() && moves(wire, direction, MOMENTS[now]),
    active: quiet() ? "" : node, chosen: state.node, meeting: kind === "meet" && !quiet() ? node : "",
    describe: ({ name, formula }, known, arrived, error) => [
      STEP_OF[name] ? formula : `input ${name}`,
      known ? `${entryName(name)} is ${show(name)}` : "not yet computed",
      arrived ? `gradient ${show(`d${name}`)}` : "no gradient yet",
      error ? `distance from finite differences ${rough(error.distance)}` : "",
    ].filter(Boolean).join(", "),
  };
}

function update() {
  compute();
  render();
}

function render() {
  const [n, features] = [results.x.length, results.x[0].length];
  drawing.fit(n, features, narrow.matches);
  drawing.update(currentView());
  renderToolbar(n, features);
  renderInspector();
  renderEditors();
  renderStory();
  saveSoon();
}

function renderToolbar(n, features) {
  const scrub = find("[data-scrub]");
  scrub.max = scenes.length - 1;
  scrub.value = state.scene;
  const text = statusText();
  scrub.setAttribute("aria-valuetext", text);
  const status = find(".status");
  if (status.textContent !== text) status.textContent = text;
  find('[data-go="-1"]').disabled = state.scene === 0;
  find('[data-go="1"]').disabled = state.scene === scenes.length - 1;
  for (const [key, count] of [["i", n], ["f", features]]) {
    const select = find(`[data-entry="${key}"]`);
    if (select.options.length !== count) {
      select.replaceChildren(...Array.from({ length: count }, (_, k) => new Option(String(k), k)));
    }
    select.value = state[key];
  }
}

function statusText() {
  const { kind, node } = MOMENTS[moment()];
  const place = `${state.scene + 1} of ${scenes.length}`;
  const gradients = GRAPH.wires.filter((wire) => wire.target === node);
  const says = {
    inputs: () => "The inputs x, gamma and beta",
    forward: () => `Forward, step ${STEP_OF[node]}: ${GRAPH.nodes.find((one) => one.name === node).formula}`,
    loss: () => "The gradient of the loss arrives: dout",
    backward: () => `Backward, step ${STEP_OF[node]}: ${gradients.map((wire) => `${wire.gradient} = ${wire.rule}`).join(", ")}`,
    meet: () => {
      const parts = GRAPH.wires.filter((wire) => wire.source === node).map((wire) => wire.gradient).sort();
      return `Two gradients meet at ${node} and add: d${node} = ${parts.join(" + ")}`;
    },
  };
  const ways = { direct: "directly", mean: "through the mean", variance: "through the variance", all: "three ways to the loss" };
  const now = light() ? `${entryName("dx")}: ${ways[light()]}` : quiet() ? sectionTitle() : says[kind]();
  const modes = [state.ones ? "dout = ones" : "", state.float32 ? "float32" : ""].filter(Boolean).map((mode) => ` · ${mode}`);
  return `${place} · ${now}${modes.join("")}`;
}

const sectionTitle = () => find("h2", scenes[state.scene].closest("section")).textContent;

// --- the story -----------------------------------------------------------------------------------

// Whether a step computes this value or gradient, or computes with it.
function uses(name, what) {
  const formulas = GRAPH.nodes.map((node) => node.formula);
  const rules = GRAPH.wires.map((wire) => `${wire.gradient} = ${wire.rule}`);
  const sums = ["dxmu = dxmu1 + dxmu2", "dx = dx1 + dx2", "column = dx"];
  const text = [...formulas, ...rules, ...sums].find((one) => one.startsWith(`${name} = `));
  return what !== "" && text.split(/\W+/).some((word) => word === what || aliases(what).includes(word));
}

function renderStory() {
  scenes.forEach((scene, k) => {
    scene.classList.toggle("current", k === state.scene);
    scene.classList.toggle("reached", k <= state.scene);
    if (k === state.scene) scene.setAttribute("aria-current", "step");
    else scene.removeAttribute("aria-current");
  });
  for (const host of findAll("[data-live]")) {
    const text = liveText(host.dataset.live, results, state.i, state.f);
    host.textContent = uses(host.dataset.live, state.hide) ? `${state.hide} is hidden: predict it` : text;
  }
  for (const host of findAll("[data-entry-name]")) host.innerHTML = `<code>${host.dataset.entryName}${entryName("x")}</code>`;
  const [n, features] = [results.x.length, results.x[0].length];
  find("[data-shape]").textContent = `${counted(n, "example")} of ${counted(features, "feature")}`;
  for (const host of findAll("[data-bars]")) bars(host, results, state.i, state.f, host.dataset.bars);
  const { i, f, ones, offset } = state;
  when("[data-jacobian]", [results, i, f], (host) => jacobianTable(host, results, i, f));
  when("[data-mistakes]", [results, ones, i, f], (host) => mistakesTable(host, GRAPH, numbersInUse(), i, f));
  when("[data-variances]", [results, f, offset], (host) => variancesExhibit(host, state.numbers.x, f, offset));
  find("[data-offset]").value = state.offset;
  find("[data-offset-value]").textContent = format(10 ** state.offset);
  forgetVerdicts([results, i, f]);
  for (const input of findAll("[data-switch]")) input.checked = state[input.dataset.switch];
}

// What was said of a prediction holds for the numbers that it was made of.
let predicted = [];

function forgetVerdicts(now) {
  if (now.some((part, k) => part !== predicted[k])) findAll(".story .predict output").forEach((output) => output.replaceChildren());
  predicted = now;
}

// Draw an exhibit again if what it shows has changed.
const exhibited = new Map();

function when(selector, shown, draw) {
  if (exhibited.get(selector)?.every((part, k) => part === shown[k])) return;
  exhibited.set(selector, shown);
  draw(find(selector));
}

const counted = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;

// --- what the reader does ------------------------------------------------------------------------

function change(changes) {
  const numbers = changes.numbers ?? state.numbers;
  state = { ...state, ...changes };
  state.i = between(state.i, 0, numbers.x.length - 1);
  state.f = between(state.f, 0, numbers.x[0].length - 1);
  update();
}

function listenToControls() {
  findAll("[data-go]").forEach((button) => button.addEventListener("click", () => go(state.scene + Number(button.dataset.go))));
  find("[data-scrub]").addEventListener("input", (event) => go(Number(event.target.value)));
  findAll("[data-entry]").forEach((select) => select.addEventListener("change", () => change({ [select.dataset.entry]: Number(select.value) })));
  findAll("[data-switch]").forEach((input) => input.addEventListener("change", () => change({ [input.dataset.switch]: input.checked })));
  find("[data-offset]").addEventListener("input", (event) => change({ offset: Number(event.target.value) }));
  find(".paste button").addEventListener("click", () => replaceArray(find(".paste select").value, find(".paste textarea").value));
  find("[data-print]").addEventListener("click", () => print());
  find("[data-reset]").addEventListener("click", () => { change({ ...initial, scene: state.scene }); });
  find("[data-copy]").addEventListener("click", async (event) => {
    const button = event.target;
    save(true);
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "It is in the address bar";
    }
  });
  const inspector = find(".inspector");
  inspector.addEventListener("click", (event) => {
    if (event.target.closest("[data-close]")) change({ node: "", hide: "" });
    const hide = event.target.closest("[data-hide]");
    if (hide) change({ hide: hide.dataset.hide, node: inspected() });
    followCell(event.target.closest("table.pick td"));
  });
  document.addEventListener("keydown", (event) => {
    const busy = event.target.closest?.("input, select, textarea, summary");
    if (event.key === "Escape" && state.node) change({ node: "", hide: "" });
    if (busy || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way) return;
    event.preventDefault();
    go(state.scene + way);
  });
}

function followCell(cell) {
  if (!cell) return;
  const f = cell.cellIndex - 1, i = cell.parentElement.rowIndex - 1;
  const perFeature = find("th", cell.parentElement).textContent === "";
  change(perFeature ? { f } : { i, f });
}

// --- scrolling: where the reader is decides which scene is told ----------------------------------

let scrollingTo = null;

// Where a scene has to be to be told. Where it is narrow the graph stands above the text; `bottom` is
// where it ends, before and after it sticks to the top.
function readingLine(bottom) {
  const { height } = find(".stage").getBoundingClientRect();
  return narrow.matches ? (bottom ?? height) + 0.25 * (innerHeight - height) : 0.42 * innerHeight;
}

function sceneInView() {
  const line = readingLine(find(".stage").getBoundingClientRect().bottom);
  return Math.max(0, scenes.findLastIndex((scene) => scene.getBoundingClientRect().top <= line + 2));
}

function followScroll() {
  if (scrollingTo !== null) return;
  const scene = sceneInView();
  if (scene === state.scene) return;
  state = { ...state, scene };
  render();
}

// Show a scene, and bring its text to the reading line.
function go(scene, behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth") {
  scene = between(scene, 0, scenes.length - 1);
  state = { ...state, scene };
  render();
  const top = scrollY + scenes[scene].getBoundingClientRect().top - readingLine();
  clearTimeout(scrollingTo);
  scrollingTo = setTimeout(() => { scrollingTo = null; }, behavior === "auto" ? 100 : 900);
  scrollTo({ top, behavior });
}

function listenToScrolling() {
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; followScroll(); });
  }, { passive: true });
  addEventListener("scrollend", () => { clearTimeout(scrollingTo); scrollingTo = null; });
  narrow.addEventListener("change", render);
}

// --- the address ---------------------------------------------------------------------------------

let saving = null;

function save(whole = false) {
  clearTimeout(saving);
  saving = null;
  // The page's own numbers stay out of it: whoever writes the page anew and reloads sees the new.
  const own = JSON.stringify(state.numbers) === JSON.stringify(initial.numbers);
  const fragment = `#${toFragment(state, !whole && own)}`;
  if (fragment !== location.hash) history.replaceState(null, "", fragment);
}

// Browsers object to an address that changes many times a second.
function saveSoon() {
  clearTimeout(saving);
  saving = setTimeout(() => save(), 250);
}

function load() {
  state = fromFragment(location.hash, initial);
  state.scene = between(state.scene, 0, scenes.length - 1);
  if (!GRAPH.nodes.some((node) => node.name === state.node)) state.node = "";
  const nodes = GRAPH.nodes.flatMap(({ name }) => [name, `d${name}`]);
  if (!nodes.includes(state.hide)) state.hide = "";
  update();
  if (state.scene > 0) go(state.scene, "auto");
}

function start() {
  for (const host of findAll("[data-math]")) host.innerHTML = typeset(host.dataset.math);
  for (const host of findAll("[data-predict]")) buildPrediction(host, host.dataset.predict, host.innerHTML);
  listenToEditors();
  listenToControls();
  listenToScrolling();
  addEventListener("hashchange", load);
  addEventListener("beforeprint", () => { state = { ...state, scene: Math.max(state.scene, MOMENTS.length - 1) }; render(); });
  history.scrollRestoration = "manual";
  load();
}

start();
