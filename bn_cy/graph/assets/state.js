// What the reader may change, and how it is written into the address.
"use strict";

const LIMITS = { rows: 64, features: 16 };
const MATRICES = ["x", "dout"];
const VECTORS = ["gamma", "beta"];

// "1 2, 3; 4 5 6", lines, brackets, tabs: all are a matrix.
function parseMatrix(text) {
  const lines = text
    .replace(/array|np\.|numpy\./g, "")
    .replace(/\]\s*,?/g, "\n")
    .replace(/[[()]/g, " ")
    .replaceAll("−", "-")
    .split(/[\n;]/)
    .map((line) => line.split(/[\s,]+/).filter(Boolean))
    .filter((words) => words.length);
  const rows = lines.map((words) => words.map(Number));
  const bad = lines.flat().find((word, k) => !Number.isFinite(rows.flat()[k]));
  if (bad !== undefined) throw new Error(`“${bad}” is no number`);
  if (!rows.length) throw new Error("there is no number in it");
  if (rows.some((row) => row.length !== rows[0].length)) throw new Error("its rows are not of one length");
  if (rows.length > LIMITS.rows || rows[0].length > LIMITS.features) {
    throw new Error(`the page shows up to ${LIMITS.rows} examples of ${LIMITS.features} features`);
  }
  return rows;
}

// Keep what there is and fill the rest with numbers that are neither 0 nor alike.
function resized(array, n, features) {
  const filler = (i, f) => Number((Math.sin(3 * i + 5 * f + 1) * 1.3).toFixed(2));
  return Array.from({ length: n }, (_, i) =>
    Array.from({ length: features }, (_, f) => array[i]?.[f] ?? filler(i, f)),
  );
}

// Replace one array of the numbers; the others take its shape.
function withArray(numbers, name, rows) {
  const result = { ...numbers };
  let [n, features] = [numbers.x.length, numbers.x[0].length];
  if (MATRICES.includes(name)) {
    result[name] = rows;
    [n, features] = [rows.length, rows[0].length];
  } else {
    const values = rows.length > 1 && rows[0].length === 1 ? rows.flat() : rows[0];
    if (values.length !== features || (rows.length > 1 && rows[0].length > 1)) {
      throw new Error(`${name} has ${features} numbers, one for each feature`);
    }
    result[name] = values;
  }
  for (const matrix of MATRICES) result[matrix] = resized(result[matrix], n, features);
  for (const vector of VECTORS) result[vector] = resized([result[vector]], 1, features)[0];
  return result;
}

const between = (value, low, high) => Math.min(high, Math.max(low, value));

// --- the address ---------------------------------------------------------------------------------

function toFragment(state, withoutNumbers = false) {
  const { x, dout, gamma, beta, eps } = state.numbers;
  const matrix = (rows) => rows.map((row) => row.join(",")).join(";");
  const numbers = { x: matrix(x), dout: matrix(dout), gamma: gamma.join(","), beta: beta.join(","), eps };
  const parts = {
    ...(withoutNumbers ? {} : numbers),
    at: `${state.i},${state.f}`, scene: state.scene, node: state.node, hide: state.hide,
    ones: state.ones ? 1 : "", float32: state.float32 ? 1 : 0, offset: state.offset,
  };
  return Object.entries(parts)
    .filter(([, value]) => value !== "" && value !== null)
    .map(([key, value]) => `${key}=${value}`)
    .join("&");
}

// Read an address over a state: what is missing or makes no sense stays as it was.
function fromFragment(fragment, state) {
  const text = fragment.replace(/^#/, "").replaceAll("%2C", ",").replaceAll("%3B", ";").replaceAll("%20", " ");
  const given = Object.fromEntries(text.split("&").map((part) => part.split(/=(.*)/s)));
  const result = { ...state, numbers: { ...state.numbers } };
  for (const name of [...MATRICES, ...VECTORS]) {
    if (!given[name]) continue;
    try {
      result.numbers = withArray(result.numbers, name, parseMatrix(given[name]));
    } catch {
      continue;
    }
  }
  const number = (key, low, high, otherwise) => {
    const value = Number(given[key] || NaN);
    return Number.isFinite(value) ? between(value, low, high) : otherwise;
  };
  result.numbers.eps = number("eps", 0, 1e6, state.numbers.eps);
  const [i, f] = (given.at ?? "").split(",").map(Number);
  if (result.numbers.x[i]?.[f] !== undefined) Object.assign(result, { i, f });
  result.i = between(result.i, 0, result.numbers.x.length - 1);
  result.f = between(result.f, 0, result.numbers.x[0].length - 1);
  result.scene = Math.round(number("scene", 0, 99, 0));
  result.offset = number("offset", 0, 7, state.offset);
  result.node = given.node ?? "";
  result.hide = given.hide ?? "";
  result.ones = given.ones === "1";
  result.float32 = "float32" in given ? given.float32 === "1" : state.float32;
  return result;
}
