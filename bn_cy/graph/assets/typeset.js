// Formulas in Python's syntax, as bn_cy/graph/steps.py has them, made into MathML; and numbers.
"use strict";

const PER_FEATURE = new Set(["gamma", "beta", "mu", "var", "sqrtvar", "ivar", "n", "eps", "l"]);

const isPerFeature = (name) =>
  PER_FEATURE.has(name) || (name.startsWith("d") && PER_FEATURE.has(name.slice(1)));

const element = (tag, ...children) => `<${tag}>${children.join("")}</${tag}>`;
const row = (...children) => element("mrow", ...children);

function identifier(name) {
  if (name === "eps") return "<mi>ε</mi>";
  const symbol = `<mi mathvariant="normal">${name}</mi>`;
  return name.length === 1 && isPerFeature(name)
    ? `<mi>${name}</mi>`
    : isPerFeature(name) ? symbol : `<msub>${symbol}<mi>i</mi></msub>`;
}

// A parser by recursive descent: equation, sum, product, power, atom. Every level returns MathML.
function mathML(text) {
  const tokens = text.match(/\*\*|\w+|\S/g);
  const next = () => tokens[0];
  const take = () => tokens.shift();

  function equation() {
    const left = sum();
    if (next() !== "=") return left;
    take();
    return row(left, "<mo>=</mo>", sum());
  }
  function sum() {
    let result = next() === "-" ? row("<mo>−</mo>", (take(), product())) : product();
    while (next() === "+" || next() === "-") {
      const sign = take() === "+" ? "+" : "−";
      result = row(result, `<mo>${sign}</mo>`, product());
    }
    return result;
  }
  function product() {
    let result = power();
    while (next() === "*" || next() === "/") {
      if (take() === "*") result = row(result, '<mspace width="0.25em"></mspace>', power());
      else result = element("mfrac", result, withoutBrackets(power()));
    }
    return result;
  }
  function power() {
    const base = atom();
    if (next() !== "**") return base;
    take();
    return element("msup", base, atom());
  }
  function atom() {
    const token = take();
    if (token === "-") return row("<mo>−</mo>", atom());
    if (token === "(") return brackets();
    if (/^\d/.test(token)) return `<mn>${token}</mn>`;
    if (next() !== "(") return identifier(token);
    take();
    const inside = withoutBrackets(brackets());
    return token === "sqrt" ? element("msqrt", inside) : row('<munder><mo>∑</mo><mi>i</mi></munder>', inside);
  }
  function brackets() {
    const inside = sum();
    take();
    return row("<mo>(</mo>", inside, "<mo>)</mo>");
  }
  return equation();
}

const withoutBrackets = (markup) =>
  markup.replace(/^<mrow><mo>\(<\/mo>(.*)<mo>\)<\/mo><\/mrow>$/s, "$1");

const typeset = (text) => `<math aria-label="${text}">${mathML(text)}</math>`;

const derivative = (step, source, local) =>
  `<math aria-label="d ${step} / d ${source} = ${local}">` +
  row(
    element("mfrac", row("<mo>∂</mo>", identifier(step)), row("<mo>∂</mo>", identifier(source))),
    "<mo>=</mo>",
    mathML(local),
  ) + "</math>";

// --- numbers -------------------------------------------------------------------------------------

// Three digits, fewer where they are exact, with a real minus.
function format(value, digits = 3) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const plain = size === 0 || (size >= 0.00995 && size < 9995);
  const short = Number(value.toPrecision(digits));
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size || 1)));
  const exact = [short, Math.fround(short)].includes(value);
  const text = plain
    ? exact ? String(short) : value.toFixed(decimals)
    : (exact ? short.toExponential() : value.toExponential(Math.max(0, digits - 2))).replace("e+", "e");
  return text.replaceAll("-", "−");
}

// A distance: what counts is its order of magnitude.
const rough = (value) => format(value, 2);
