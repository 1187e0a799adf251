// Tables: heat maps to look at, and those of the inputs, in which every number can be changed.
"use strict";

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

// --- the numbers that go in ----------------------------------------------------------------------

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
