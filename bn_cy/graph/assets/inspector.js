// A node in detail: formula, local derivatives, tables, the check; and predictions of what is hidden.
"use strict";

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

// --- predictions ---------------------------------------------------------------------------------

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
