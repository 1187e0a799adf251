// What the page computes, and no more: no element of the page is touched here.
//
// A matrix is an array of rows, a row an example; what there is once per feature is an array of
// numbers. `steps` is the twin of bn_cy/graph/sequential.py: sums run from the first row to the
// last, and `round` is applied after every operation, so that with Math.fround all bits are those of
// NumPy's float32. The graph itself, which step feeds which, comes from bn_cy/graph/steps.py.
"use strict";

const double = (value) => value;
const single = Math.fround;

const isMatrix = (array) => Array.isArray(array[0]);

// Arithmetic on matrices, rows of features and numbers, rounded after every operation.
function arithmetic(round) {
  const ofRows = (operation, a, b, length) => {
    const result = new Array(length);
    for (let f = 0; f < length; f += 1) {
      result[f] = round(operation(typeof a === "number" ? a : a[f], typeof b === "number" ? b : b[f]));
    }
    return result;
  };
  const elementwise = (operation) => (a, b = 0) => {
    const row = (operand, i) => (isMatrix(operand) ? operand[i] : operand);
    const matrix = [a, b].find(isMatrix);
    const { length } = [row(a, 0), row(b, 0)].find(Array.isArray);
    if (!matrix) return ofRows(operation, a, b, length);
    return matrix.map((_, i) => ofRows(operation, row(a, i), row(b, i), length));
  };
  return {
    add: elementwise((a, b) => a + b),
    subtract: elementwise((a, b) => a - b),
    multiply: elementwise((a, b) => a * b),
    divide: elementwise((a, b) => a / b),
    negate: elementwise((a) => -a),
    sqrt: elementwise(Math.sqrt),
    sum: (rows) => rows[0].map((_, f) => rows.reduce((total, row) => round(total + row[f]), 0)),
  };
}

const copies = (row, n) => Array.from({ length: n }, () => [...row]);

// The forward pass as functions of what was computed before. A `slip` names a mistake to make.
function forwardSteps(n, round, slip = {}) {
  const { add, subtract, multiply, divide, sqrt, sum } = arithmetic(round);
  const varianceCount = slip.var ? 1 : slip.less ? n - 1 : n;
  return {
    mu: (v) => divide(sum(v.x), slip.mu ? 1 : n),
    xmu: (v) => subtract(v.x, v.mu),
    sq: (v) => multiply(v.xmu, v.xmu),
    var: (v) => divide(sum(v.sq), varianceCount),
    sqrtvar: (v) => (slip.eps ? add(sqrt(v.var), v.eps) : sqrt(add(v.var, v.eps))),
    ivar: (v) => divide(1, v.sqrtvar),
    xhat: (v) => multiply(v.xmu, v.ivar),
    gammax: (v) => multiply(v.gamma, v.xhat),
    out: (v) => add(v.gammax, v.beta),
  };
}

// Both passes: every value and every gradient by its name in bn_cy.reference.
function steps(numbers, round = double, slip = {}) {
  const { add, multiply, divide, negate, sum } = arithmetic(round);
  const rounded = (array) => (isMatrix(array) ? array.map(rounded) : array.map(round));
  const n = numbers.x.length;
  const v = { eps: round(numbers.eps) };
  for (const name of ["x", "gamma", "beta", "dout"]) v[name] = rounded(numbers[name]);
  for (const [name, compute] of Object.entries(forwardSteps(n, round, slip))) v[name] = compute(v);

  v.dgammax = v.dout;
  v.dbeta = sum(v.dout);
  v.dxhat = multiply(v.gamma, v.dgammax);
  v.dgamma = sum(slip.sum ? v.xhat : multiply(v.dgammax, v.xhat));
  v.dxmu1 = multiply(v.dxhat, v.ivar);
  v.divar = sum(slip.sum ? v.xmu : multiply(slip.dvarFrom ?? v.dxhat, v.xmu));
  v.dsqrtvar = divide(negate(v.divar), multiply(v.sqrtvar, v.sqrtvar));
  v.dvar = divide(v.dsqrtvar, multiply(2, v.sqrtvar));
  v.dsq = copies(divide(v.dvar, slip.dsq ? 1 : slip.less === "both" ? n - 1 : n), n);
  v.dxmu2 = multiply(multiply(2, v.xmu), v.dsq);
  v.dxmu = add(v.dxmu1, v.dxmu2);
  v.dx1 = v.dxmu;
  v.dmu = negate(sum(slip.dmuFrom ? add(multiply(slip.dmuFrom, v.ivar), v.dxmu2) : v.dxmu));
  v.dx2 = copies(divide(v.dmu, slip.dx2 ? 1 : n), n);
  v.dx = add(v.dx1, v.dx2);
  return v;
}

// --- central differences -------------------------------------------------------------------------

// The length over which the loss bends when a node is moved; in the others it is linear.
const BENDS = {
  x: (v) => v.sqrtvar,
  mu: (v) => v.sqrtvar,
  xmu: (v) => v.sqrtvar,
  sq: (v) => v.sqrtvar.map((s) => s * s),
  var: (v) => v.sqrtvar.map((s) => s * s),
  sqrtvar: (v) => v.sqrtvar,
  ivar: (v) => v.ivar,
};

// out, after one node has been given a value: what depends on it is computed again, and no more.
function downstream(graph, name, value, v) {
  const changed = { ...v, [name]: value };
  const touched = new Set([name]);
  for (const [step, compute] of Object.entries(forwardSteps(v.x.length, double))) {
    if (!graph.wires.some((wire) => wire.target === step && touched.has(wire.source))) continue;
    changed[step] = compute(changed);
    touched.add(step);
  }
  return changed.out;
}

// The gradient of sum(out * dout) by one node, of fourth order, in float64. Features do not mix, so
// an entry of each is moved at once, by a step of its own.
function numericGradient(graph, name, v) {
  const value = v[name];
  const rows = isMatrix(value) ? value : [value];
  const largest = rows[0].map((_, f) => Math.max(1, ...rows.map((row) => Math.abs(row[f]))));
  const scale = name in BENDS ? BENDS[name](v) : largest;
  const h = scale.map((s) => 2 ** (Math.round(Math.log2(s)) - 10));
  const moved = (i, times) => {
    const nearby = rows.map((row, k) => (k === i ? row.map((a, f) => a + times * h[f]) : row));
    return downstream(graph, name, isMatrix(value) ? nearby : nearby[0], v);
  };
  const numeric = rows.map((_, i) => {
    const [a, b, c, d] = [moved(i, 1), moved(i, -1), moved(i, 2), moved(i, -2)];
    return h.map((step, f) => {
      const change = (k) => 8 * (a[k][f] - b[k][f]) - (c[k][f] - d[k][f]);
      return v.dout.reduce((total, row, k) => total + change(k) * row[f], 0) / (12 * step);
    });
  });
  return isMatrix(value) ? numeric : numeric[0];
}

const flat = (array) => array.flat();

function distance(a, b) {
  const [p, q] = [flat(a), flat(b)];
  return Math.max(...p.map((value, k) => Math.abs(value - q[k])));
}

// Whether a gradient agrees with differences, as far as these can tell.
function agrees(gradient, numeric, tolerance = 1e-6) {
  const size = Math.max(1, ...flat(numeric).map(Math.abs));
  return distance(gradient, numeric) <= tolerance * size;
}

// --- what the exhibits show ----------------------------------------------------------------------

// dx[i, f] as its three ways to the loss.
function paths(v, i, f) {
  return { direct: v.dxmu1[i][f], mean: v.dx2[i][f], variance: v.dxmu2[i][f] };
}

// dy_k/dx_i of a feature, in row k and column i; the twin of bn_cy.reference.jacobian.
function jacobian(v, f) {
  const n = v.x.length;
  const xhat = v.xhat.map((row) => row[f]);
  const scale = v.gamma[f] * v.ivar[f];
  return xhat.map((a, k) => xhat.map((b, i) => scale * ((k === i ? 1 : 0) - (1 + a * b) / n)));
}

// The variance of every feature in three ways; the twin of bn_cy.graph.sequential.variances.
function variances(x, round) {
  const { subtract, multiply, divide, sum } = arithmetic(round);
  const mean = (rows) => divide(sum(rows), rows.length);
  const onePass = (rows) => {
    const m = mean(rows);
    return subtract(mean(multiply(rows, rows)), multiply(m, m));
  };
  const xmu = subtract(x, mean(x));
  return {
    one_pass: onePass(x),
    two_pass: mean(multiply(xmu, xmu)),
    shifted: onePass(subtract(x, x[0])),
  };
}

// --- circulating mistakes ------------------------------------------------------------------------

// Each with the places in which it may be made, one set of slips a place.
const MISTAKES = [
  {
    name: "1/n forgotten",
    hint: "what was a mean forward is a sum divided by n, and so is its gradient.",
    slips: () => [
      { mu: true }, { var: true }, { mu: true, var: true }, { dsq: true }, { dx2: true },
      { dsq: true, dx2: true },
    ],
    shown: () => ({ dsq: true, dx2: true }),
  },
  {
    name: "dx where dxhat belongs",
    hint: "the sums for the variance and the mean start from dxhat; dx is the last thing known.",
    slips: (v) => [{ dvarFrom: v.dx, dmuFrom: v.dx }, { dvarFrom: v.dx }, { dmuFrom: v.dx }],
    shown: (v) => ({ dvarFrom: v.dx, dmuFrom: v.dx }),
  },
  {
    name: "the sum without dout",
    hint: "xhat alone sums to 0, so without the upstream gradient inside it the sum is lost.",
    slips: () => [{ sum: true }],
    shown: () => ({ sum: true }),
  },
  {
    name: "eps outside the root",
    hint: "it is sqrt(var + eps), not sqrt(var) + eps.",
    slips: () => [{ eps: true }],
    shown: () => ({ eps: true }),
  },
  {
    name: "n-1 for n",
    hint: "batch norm divides by n in training, forward and backward.",
    slips: () => [{ less: "both" }, { less: "forward" }],
    shown: () => ({ less: "both" }),
  },
];

// Whether a typed number is this one, to the digits that were typed or half a percent.
function matches(typed, value, size) {
  const digits = typed.replace(/e.*$/i, "").replace(/^[^1-9]*/, "").replace(/\D/g, "").length;
  const decimals = (/\.(\d*)/.exec(typed)?.[1].length ?? 0) - (Number(/e(.*)$/i.exec(typed)?.[1]) || 0);
  const unit = digits >= 2 ? 0.5000001 * 10 ** -decimals : 0;
  return Math.abs(Number(typed) - value) <= Math.max(unit, 0.005 * Math.abs(value), 1e-9 * size);
}

// Tell what a predicted number is: {right}, {mistakes}, {sign}, {part} or {}.
function diagnose(typed, numbers, name, i, f) {
  const v = steps(numbers);
  const at = (results, key = name) => (isMatrix(results[key]) ? results[key][i][f] : results[key][f]);
  const size = Math.max(...flat(v[name]).map(Math.abs)) || 1;
  const value = at(v);
  if (matches(typed, value, size)) return { right: true };
  const mistakes = MISTAKES.filter((mistake) =>
    mistake.slips(v).some((slip) => {
      const wrong = at(steps(numbers, double, slip));
      return Math.abs(wrong - value) > 1e-9 * size && matches(typed, wrong, size);
    }),
  );
  if (mistakes.length) return { mistakes };
  const parts = [`${name}1`, `${name}2`].filter((part) => part in v);
  const part = parts.find((key) => matches(typed, at(v, key), size));
  if (part) return { part };
  return matches(typed, -value, size) ? { sign: true } : {};
}
