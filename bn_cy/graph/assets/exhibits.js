// What stands in the story beside the text: bars, the Jacobian, the mistakes, the variances.
"use strict";

const html = (strings, ...values) => String.raw({ raw: strings }, ...values);

// The three ways as signed bars from a common zero; those not yet told of are left out.
function bars(host, v, i, f, told) {
  const parts = paths(v, i, f);
  const shown = told === "all" ? Object.keys(parts) : Object.keys(parts).slice(0, Object.keys(parts).indexOf(told) + 1);
  const total = v.dx[i][f];
  const reach = Math.max(...Object.values(parts).map(Math.abs), Math.abs(total)) || 1;
  const rows = shown.map((way) => [way, parts[way]]);
  if (told === "all") rows.push(["dx", total]);
  const [middle, half] = [225, 105];
  const lines = rows.map(([way, value], k) => {
    const y = 4 + 26 * k, width = Number.isFinite(value / reach) ? (Math.abs(value) / reach) * half : 0;
    const colour = way === "dx" ? "var(--ink)" : `var(--${way})`;
    const name = way === "dx" ? `dx[${i}, ${f}]` : way;
    return html`<text x="0" y="${y + 14}" font-size="14">${name}</text>
      <rect x="${value < 0 ? middle - width : middle}" y="${y}" width="${width}" height="18" rx="2" fill="${colour}"></rect>
      <text x="${400}" y="${y + 14}" font-size="14" text-anchor="end">${format(value)}</text>`;
  });
  const height = 26 * rows.length + 6;
  const label = rows.map(([way, value]) => `${way} ${format(value)}`).join(", ");
  host.innerHTML = html`<svg class="bars" viewBox="0 0 400 ${height}" role="img" aria-label="${label}">
    ${lines.join("")}<path class="axis" d="M${middle} 0V${height}"></path></svg>`;
}

// dy_k/dx_i with the sums of the rows; above eight examples colours alone.
function jacobianTable(host, v, i, f) {
  const matrix = jacobian(v, f);
  const sums = matrix.map((row) => row.reduce((total, value) => total + value, 0));
  const n = matrix.length, bare = n > 8, largest = largestOf(matrix);
  const head = matrix.map((_, k) => `<th scope="col">${bare ? "" : k}</th>`).join("");
  const rows = matrix.map((row, k) => {
    const cells = row.map((value, j) => cellMarkup(value, largest, j === i && (k === 0 || !bare))).join("");
    return `<tr><th scope="row">${bare ? "" : k}</th>${cells}<td>${bare ? "" : `&nbsp;${rough(sums[k])}`}</td></tr>`;
  });
  const worst = Math.max(...sums.map(Math.abs));
  host.innerHTML = html`<div style="overflow-x:auto;padding:2px"><table class="${bare ? "bare" : ""} jacobian" style="--cell:${(20 / n).toFixed(2)}rem">
    <caption class="small" style="caption-side:bottom;text-align:left">Largest sum of a row: <span data-rowsum>${rough(worst)}</span>. Outlined: column ${i}.</caption>
    <thead><tr><th></th>${head}<th scope="col">${bare ? "" : "sum"}</th></tr></thead><tbody>${rows.join("")}</tbody></table></div>`;
}

function cellMarkup(value, largest, followed = false, text = format(value, Math.abs(value) < 0.1 ? 2 : 3)) {
  const strength = largest > 0 && Number.isFinite(value) ? Math.min(1, Math.abs(value) / largest) : 0;
  const classes = [value > 0 ? "positive" : value < 0 ? "negative" : "", followed ? "followed" : ""];
  return `<td><span class="${classes.join(" ").trim()}" style="--t:${strength.toFixed(3)}">${text}</span></td>`;
}

// Each mistake carried through to dx, in float64, and held against differences.
function mistakesTable(host, graph, numbers, i, f) {
  const right = steps(numbers);
  const numeric = numericGradient(graph, "x", right);
  const line = (name, dx) => {
    const passes = agrees(dx, numeric);
    const verdict = passes ? "passes" : "found";
    const good = passes === (name === "no mistake");
    return html`<tr data-mistake="${name}"><th scope="row">${name}</th><td>${format(dx[i][f])}</td>
      <td>${rough(distance(dx, numeric))}</td><td class="${good ? "good" : "bad"}">${verdict}</td></tr>`;
  };
  const lines = MISTAKES.map(({ name, shown }) => line(name, steps(numbers, double, shown(right)).dx));
  host.innerHTML = html`<table class="plain"><thead><tr><th scope="col"></th><th scope="col">dx[${i}, ${f}]</th>
    <th scope="col">distance</th><th scope="col">the check</th></tr></thead>
    <tbody>${line("no mistake", right.dx)}${lines.join("")}</tbody></table>`;
}

const FORMULAS = {
  one_pass: { label: "E[x²] − E[x]²", colour: "var(--bad)" },
  two_pass: { label: "two passes", colour: "var(--forward)" },
  shifted: { label: "shifted", colour: "var(--variance)" },
};

// The rows of x with an offset, as float32 has them, and the relative errors of their variances.
function variancesAt(x, offset) {
  const moved = x.map((row) => row.map((value) => single(single(value) + single(offset))));
  const exact = variances(moved, double).two_pass;
  const computed = variances(moved, single);
  const error = (name, f) => (exact[f] === computed[name][f] ? 0 : Math.abs(computed[name][f] / exact[f] - 1));
  return { exact, computed, error };
}

function variancesExhibit(host, x, f, exponent) {
  const here = variancesAt(x, 10 ** exponent);
  const rows = Object.entries(FORMULAS).map(([name, { label, colour }]) =>
    html`<tr data-variance="${name}"><th scope="row"><b style="color:${colour}">${label}</b></th>
      <td>${format(here.computed[name][f], 5)}</td><td>${rough(here.error(name, f))}</td></tr>`);
  host.innerHTML = html`<table class="plain"><thead><tr><th scope="col"></th><th scope="col">variance</th><th scope="col">relative error</th></tr></thead>
    <tbody><tr><th scope="row">exact</th><td>${format(here.exact[f], 5)}</td><td></td></tr>${rows.join("")}</tbody></table>
    ${errorChart(x, exponent)}`;
}

const chartOf = new WeakMap();

// The largest relative error of any feature against the offset, on logarithmic axes.
function errorChart(x, exponent) {
  const [left, right, top, bottom] = [38, 395, 8, 150];
  const across = (e) => left + ((right - left) * e) / 7;
  const down = (error) => top + ((bottom - top) * (2 - Math.log10(between(error, 1e-8, 100)))) / 10;
  const exponents = Array.from({ length: 71 }, (_, k) => k / 10);
  const results = chartOf.get(x) ?? exponents.map((e) => variancesAt(x, 10 ** e));
  chartOf.set(x, results);
  const worst = (result, name) => {
    const errors = x[0].map((_, f) => result.error(name, f)).filter((error) => !Number.isNaN(error));
    return Math.max(0, ...errors);
  };
  const lines = Object.entries(FORMULAS).map(([name, { colour }]) => {
    const points = results.map((result, k) => `${across(exponents[k]).toFixed(1)},${down(worst(result, name)).toFixed(1)}`);
    return `<polyline class="line" style="stroke:${colour}" points="${points.join(" ")}"></polyline>`;
  });
  const label = (x, y, text, anchor = "end") => `<text class="soft" x="${x}" y="${y}" font-size="12" text-anchor="${anchor}">${text}</text>`;
  const grid = [[1, "1"], [1e-4, "1e−4"], [1e-8, "1e−8"]].map(([error, text]) =>
    `<path class="axis" d="M${left} ${down(error)}H${right}"></path>${label(left - 6, down(error) + 4, text)}`);
  return html`<svg class="chart" viewBox="0 0 400 186" role="img" aria-label="Relative error of three formulas for the variance against the offset">
    ${grid.join("")}${lines.join("")}<path class="here" d="M${across(exponent)} ${top}V${bottom}"></path>
    ${label(left, 166, "1", "start")}${label(across(3.5), 166, "offset", "middle")}${label(right, 166, "1e7")}
    ${label(left, 184, "relative error, worst feature", "start")}</svg>`;
}
