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

// --- computing ------------------------------------------------------------------------------------

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

// --- the view ---------------------------------------------------------------------------------------

const moment = () => Number(scenes[state.scene].dataset.moment);
// After the last moment nothing moves: the exhibits have the word.
const quiet = () => state.scene >= MOMENTS.length;
const light = () => scenes[state.scene].dataset.light ?? "";
const entryOf = (name) => (isMatrix(results[name]) ? results[name][state.i][state.f] : results[name][state.f]);
const entryName = (name) => `${name}[${isMatrix(results[name]) ? `${state.i}, ` : ""}${state.f}]`;
const show = (name, digits = 3) => (isHidden(name) ? "?" : format(entryOf(name), digits));
// The only gradient that arrives at a node is the node's own.
const isHidden = (name) => state.hide !== "" && (name === state.hide || aliases(state.hide).includes(name));
const aliases = (name) => ({ dxmu: ["dx1"], dout: ["dgammax"], dgammax: ["dout"], dx1: ["dxmu"] })[name] ?? [];

function nodeError(name) {
  const gradient = results[`d${name}`];
  const bad = !agrees(gradient, differences[name], state.float32 ? 1e-3 : 1e-6);
  return { distance: distance(gradient, differences[name]), bad };
}

function currentView() {
  const now = moment(), { kind, node } = MOMENTS[now];
  return {
    results, i: state.i, f: state.f, hide: state.hide, light: light(), show, error: nodeError,
    passed: (wire) => now >= TIMES.value[wire.target],
    cameBack: (gradient) => now >= TIMES.wire[gradient],
    known: (name) => now >= TIMES.value[name],
    arrived: (name) => now >= TIMES.gradient[name],
    now: (wire, direction) =>
      quiet() ? false : direction === "forward" ? kind === "forward" && wire.target === node
      : kind === "meet" ? wire.source === node
      : kind === "loss" ? wire.gradient === "dout" : kind === "backward" && wire.target === node,
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

// --- tables -------------------------------------------------------------------------------------------

const asRows = (array) => (typeof array === "number" ? [[array]] : isMatrix(array) ? array : [array]);

function headMarkup(rows, perFeature) {
  return rows[0].map((_, f) => `<th scope="col">${rows[0].length > 1 || !perFeature ? f : ""}</th>`).join("");
}

// A heat map with numbers; a click on a cell follows its entry.
function tableMarkup(name, array, hidden = false) {
  const rows = asRows(array), perFeature = !isMatrix(array), largest = Math.max(NOISE, largestOf(array));
  const body = rows.map((row, i) => {
    const cells = row.map((value, f) =>
      hidden ? cellMarkup(0, 1, false, "?") : cellMarkup(value, largest, f === state.f && (perFeature || i === state.i)));
    return `<tr><th scope="row">${perFeature ? "" : i}</th>${cells.join("")}</tr>`;
  });
  return html`<figure><figcaption>${name}</figcaption><table class="pick"><thead><tr><th></th>${headMarkup(rows, perFeature)}</tr></thead>
    <tbody>${body.join("")}</tbody></table></figure>`;
}

let editorsShow = null;

// Tables of inputs, built when the shape changes; numbers are written into them unless they are
// being typed.
function renderEditors(always = false) {
  const { numbers, i: example, f: feature, ones } = state;
  const shown = [numbers, example, feature, ones];
  if (!always && editorsShow?.every((part, k) => part === shown[k])) return;
  editorsShow = shown;
  for (const host of findAll("[data-edit]")) {
    const name = host.dataset.edit;
    const rows = asRows(state.numbers[name]);
    const shape = `${rows.length} ${rows[0].length}`;
    if (host.dataset.shape !== shape) buildEditor(host, name, rows, shape);
    const largest = largestOf(rows), matrix = MATRICES.includes(name);
    for (const input of findAll("input", host)) {
      const [i, f] = [Number(input.dataset.i), Number(input.dataset.f)];
      const shown = name === "dout" && state.ones ? 1 : rows[i][f];
      const typing = input === document.activeElement && input.getAttribute("aria-invalid") === "true";
      if (!typing && readNumber(input.value) !== shown) input.value = String(shown);
      input.disabled = name === "dout" && state.ones;
      if (name !== "eps") paint(input, shown, name === "dout" && state.ones ? 1 : largest);
      input.classList.toggle("followed", name !== "eps" && f === state.f && (!matrix || i === state.i));
    }
  }
}

function buildEditor(host, name, rows, shape) {
  const perFeature = !MATRICES.includes(name);
  const meaning = { x: "the batch", dout: "the upstream gradient", gamma: "scale", beta: "shift", eps: "under the root" }[name];
  const label = (i, f) => (name === "eps" ? "eps" : perFeature ? `${name}, feature ${f}` : `${name}, example ${i}, feature ${f}`);
  const body = rows.map((row, i) => {
    const cells = row.map((_, f) => html`<td><input type="text" inputmode="decimal" autocomplete="off" spellcheck="false"
      aria-label="${label(i, f)}" data-name="${name}" data-i="${i}" data-f="${f}"></td>`);
    return `<tr><th scope="row">${perFeature ? "" : i}</th>${cells.join("")}</tr>`;
  });
  host.dataset.shape = shape;
  host.innerHTML = html`<figure><figcaption>${name} <small>${meaning}</small></figcaption><table>
    ${name === "eps" ? "" : `<thead><tr><th></th>${headMarkup(rows, perFeature)}</tr></thead>`}<tbody>${body.join("")}</tbody></table></figure>`;
}

// --- the inspector --------------------------------------------------------------------------------------

const inspected = () => state.node || MOMENTS[moment()].node || "x";

function renderInspector() {
  const host = find(".inspector");
  host.classList.toggle("open", state.node !== "");
  const key = JSON.stringify([inspected(), state, moment(), results.x.length]);
  if (host.dataset.key === key) return;
  const typing = host.contains(document.activeElement) ? document.activeElement.dataset.keep : undefined;
  host.dataset.key = key;
  const name = inspected(), node = GRAPH.nodes.find((one) => one.name === name);
  const known = moment() >= TIMES.value[name], arrived = moment() >= TIMES.gradient[name];
  host.innerHTML = html`<header><h2>${name}</h2>${inspectorFormulas(node)}${inspectorButtons(name, known, arrived)}</header>
    <div class="tables">${inspectorTables(node, known, arrived)}</div>${passedOn(name)}<div class="guess"></div>`;
  if (state.hide) buildPrediction(find(".guess", host), state.hide, `Predict ${entryName(state.hide)}.`, () => change({ hide: "" }));
  if (typing) find(`[data-keep="${typing}"]`, host)?.focus();
}

function inspectorFormulas({ name, step, formula }) {
  const locals = GRAPH.wires.filter((wire) => wire.target === name).map((wire) => derivative(name, wire.source, wire.local));
  return step ? `<span>${typeset(formula)}</span>${locals.map((local) => `<span>${local}</span>`).join("")}` : "<span>an input</span>";
}

function inspectorButtons(name, known, arrived) {
  const value = known && STEP_OF[name] ? `<button type="button" data-keep="hide-value" data-hide="${name}">Predict its value</button>` : "";
  const gradient = arrived && name !== "out" ? `<button type="button" data-keep="hide-gradient" data-hide="d${name}">Predict its gradient</button>` : "";
  const close = state.node ? '<button type="button" class="close" data-close aria-label="Close">Close</button>' : "";
  return state.hide ? close : value + gradient + close;
}

function inspectorTables({ name }, known, arrived) {
  if (!known) return `<p class="note">${name} is not computed yet. Step on.</p>`;
  const value = tableMarkup(name, results[name], isHidden(name));
  if (!arrived) return value;
  const gradient = `d${name}`, hidden = isHidden(gradient);
  const arriving = GRAPH.wires.filter((wire) => wire.source === name).map((wire) => wire.gradient).sort();
  const operator = (sign) => `<span class="operator" aria-hidden="true">${sign}</span>`;
  const parts = arriving.length < 2 ? "" : arriving.map((part) => tableMarkup(part, results[part], isHidden(part))).join(operator("+")) + operator("=");
  const error = nodeError(name);
  const verdict = error.bad ? `<span class="bad">≠ ${rough(error.distance)} apart</span>` : `<span class="good">✓ at most ${rough(error.distance)} apart</span>`;
  const check = `<div>${tableMarkup("by differences", differences[name], hidden)}<p class="verdict" data-distance="${error.distance}">${verdict}</p></div>`;
  const sum = tableMarkup(gradient, results[gradient], hidden);
  // Where gradients meet, the sum is what matters.
  return parts ? parts + sum + check + value : value + sum + check;
}

function passedOn(name) {
  const leaving = GRAPH.wires.filter((wire) => wire.target === name && moment() >= TIMES.wire[wire.gradient]);
  const rules = leaving.map((wire) => `<span>${typeset(`${wire.gradient} = ${wire.rule}`)}</span>`);
  return rules.length ? `<p class="passes">passes on ${rules.join("")}</p>` : "";
}

// Whether a step computes this value or gradient, or computes with it.
function uses(name, what) {
  const formulas = GRAPH.nodes.map((node) => node.formula);
  const rules = GRAPH.wires.map((wire) => `${wire.gradient} = ${wire.rule}`);
  const sums = ["dxmu = dxmu1 + dxmu2", "dx = dx1 + dx2", "column = dx"];
  const text = [...formulas, ...rules, ...sums].find((one) => one.startsWith(`${name} = `));
  return what !== "" && text.split(/\W+/).some((word) => word === what || aliases(what).includes(word));
}

// --- the story -------------------------------------------------------------------------------------------

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

// A question, a field, and what the answer turns out to be.
function buildPrediction(host, name, question, done) {
  host.innerHTML = html`<form class="predict" data-name="${name}"><label>${question} <span class="row">
    <input type="text" inputmode="decimal" autocomplete="off" aria-label="Your prediction of ${name}" data-keep="guess">
    <button>Check</button><button type="button" data-show>Show it</button></span></label><output aria-live="polite"></output></form>`;
  const form = find("form", host);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    find("output", form).innerHTML = verdictOn(find("input", form).value, name);
  });
  find("[data-show]", form).addEventListener("click", () => {
    find("output", form).textContent = `${entryName(name)} = ${format(entryOf(name), 5)}`;
    done?.();
  });
}

function verdictOn(text, name) {
  const typed = text.trim().replaceAll("−", "-").replace(",", ".");
  if (!Number.isFinite(readNumber(typed))) return "Type a number, such as −0.25.";
  const found = diagnose(typed, numbersInUse(), name, state.i, state.f);
  if (found.right) return `<b class="good">Right.</b> ${entryName(name)} = ${format(entryOf(name), 5)}.`;
  if (found.mistakes) {
    const names = found.mistakes.map((mistake) => `<b>${mistake.name}</b>: ${mistake.hint}`);
    return `<b class="bad">Not yet.</b> That is what comes out with ${names.join(" Or with ")}`;
  }
  if (found.part) return `<b class="bad">Not yet.</b> That is ${found.part} alone. Two gradients meet here.`;
  if (found.sign) return '<b class="bad">Not yet.</b> The size is right, the sign is not.';
  return '<b class="bad">Not yet</b>, and it is none of the mistakes known here. Go back one step.';
}

// --- what the reader does ----------------------------------------------------------------------------------

function change(changes) {
  const numbers = changes.numbers ?? state.numbers;
  state = { ...state, ...changes };
  state.i = between(state.i, 0, numbers.x.length - 1);
  state.f = between(state.f, 0, numbers.x[0].length - 1);
  update();
}

function setEntry(name, i, f, value) {
  const numbers = structuredClone(state.numbers);
  if (name === "eps") numbers.eps = Math.max(0, value);
  else asRows(numbers[name])[i][f] = value;
  change({ numbers, ...(name === "eps" ? {} : { f, ...(MATRICES.includes(name) ? { i } : {}) }) });
}

function replaceArray(name, text) {
  const note = find("[data-note]");
  try {
    if (name === "eps") throw new Error("eps is one number");
    change({ numbers: withArray(state.numbers, name, parseMatrix(text)) });
    note.textContent = `${name} has been replaced.`;
  } catch (error) {
    note.textContent = `This is no matrix for ${name}: ${error.message}.`;
  }
}

function listenToEditors() {
  const target = (event) => event.target.closest?.("input[data-name]");
  const place = (input) => [input.dataset.name, Number(input.dataset.i), Number(input.dataset.f)];
  document.addEventListener("input", (event) => {
    const input = target(event);
    if (!input) return;
    const value = readNumber(input.value);
    const valid = Number.isFinite(value) && (input.dataset.name !== "eps" || value >= 0);
    input.setAttribute("aria-invalid", String(!valid));
    if (valid) setEntry(...place(input), value);
  });
  document.addEventListener("focusout", (event) => {
    const input = target(event);
    if (!input) return;
    input.removeAttribute("aria-invalid");
    queueMicrotask(() => renderEditors(true));
  });
  document.addEventListener("paste", (event) => {
    const input = target(event);
    const text = event.clipboardData.getData("text");
    if (!input || !/\d[\s,;]+[-+.\d[]/.test(text.trim())) return;
    event.preventDefault();
    replaceArray(input.dataset.name, text);
  });
  document.addEventListener("keydown", (event) => {
    const input = target(event);
    if (!input || (event.key !== "ArrowUp" && event.key !== "ArrowDown")) return;
    event.preventDefault();
    nudge(input, readNumber(input.value), event.key === "ArrowUp" ? 1 : -1, place(input));
  });
  listenToDragging(target, place);
}

// A number as people type it; NaN where it is none.
function readNumber(text) {
  const plain = text.trim().replaceAll("−", "-").replace(",", ".");
  return plain === "" ? NaN : Number(plain);
}

// A step is a hundredth of the size of the array, to one digit.
function nudge(input, from, times, [name, i, f]) {
  const size = largestOf(asRows(state.numbers[name])) || 1;
  const exponent = Math.floor(Math.log10(size)) - (name === "eps" ? 1 : 2);
  const value = Number((from + times * 10 ** exponent * (name === "eps" ? 1 : 2)).toFixed(Math.max(0, -exponent)));
  setEntry(name, i, f, value);
  input.value = String(name === "eps" ? Math.max(0, value) : value);
}

function listenToDragging(target, place) {
  let drag = null;
  document.addEventListener("pointerdown", (event) => {
    const input = target(event);
    if (!input || input.disabled || event.button !== 0 || input === document.activeElement) return;
    drag = { input, x: event.clientX, from: readNumber(input.value), moving: false };
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const way = event.clientX - drag.x;
    if (!drag.moving && Math.abs(way) < 5) return;
    drag.moving = true;
    document.getSelection()?.removeAllRanges();
    nudge(drag.input, drag.from, Math.round(way / 3), place(drag.input));
  });
  for (const name of ["pointerup", "pointercancel"]) {
    document.addEventListener(name, () => {
      if (drag?.moving) drag.input.blur();
      drag = null;
    });
  }
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

// --- scrolling: where the reader is decides which scene is told ------------------------------------------------

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

// --- the address -------------------------------------------------------------------------------------------------

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
