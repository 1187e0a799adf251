// The order of the lesson: which moment shows what, and each step with the reader's numbers in it.
"use strict";

// Inputs; the steps forward; the loss; the steps backward, and before a step whose value was used
// twice, the place where its two gradients meet.
function momentsOf(graph) {
  const names = graph.nodes.filter((node) => node.step).map((node) => node.name);
  const meets = (name) => graph.wires.filter((wire) => wire.source === name).length === 2;
  const backward = [...names].reverse().flatMap((node) => [
    ...(meets(node) ? [{ kind: "meet", node }] : []),
    { kind: "backward", node },
  ]);
  return [
    { kind: "inputs" },
    ...names.map((node) => ({ kind: "forward", node })),
    { kind: "loss", node: "out" },
    ...backward,
    { kind: "meet", node: "x" },
  ];
}

// The moments from which on values, gradients on wires and gradients of nodes are known.
function timetable(graph, moments) {
  const find = (kind, node) => moments.findIndex((m) => m.kind === kind && m.node === node);
  const value = {}, wire = { dout: find("loss", "out") }, gradient = { out: wire.dout };
  for (const { name, step } of graph.nodes) value[name] = step ? find("forward", name) : 0;
  for (const { gradient: name, target } of graph.wires) wire[name] = find("backward", target);
  for (const { name } of graph.nodes) {
    if (name === "out") continue;
    const meeting = find("meet", name);
    const arriving = graph.wires.filter((w) => w.source === name).map((w) => wire[w.gradient]);
    gradient[name] = meeting >= 0 ? meeting : Math.max(...arriving);
  }
  return { value, wire, gradient };
}

// A step with the numbers of the entry followed. `bare` writes a number into a sum or product.
function liveText(name, v, i, f) {
  const n = v.x.length;
  const at = (key) => (isMatrix(v[key]) ? v[key][i][f] : v[key][f]);
  const bare = (value) => (value < 0 ? `(${format(value)})` : format(value));
  const column = (key) => v[key].map((row) => row[f]);
  const sum = (terms) => {
    const shown = terms.length > 6 ? [...terms.slice(0, 3), "…", terms.at(-1)] : terms;
    return shown.join(" + ");
  };
  const products = (a, b) => sum(column(a).map((value, k) => `${bare(value)}·${bare(column(b)[k])}`));
  const texts = {
    mu: () => `(${sum(column("x").map(bare))}) / ${n}`,
    xmu: () => `${format(at("x"))} − ${bare(at("mu"))}`,
    sq: () => `${bare(at("xmu"))}²`,
    var: () => `(${sum(column("sq").map(bare))}) / ${n}`,
    sqrtvar: () => `√(${format(at("var"))} + ${format(v.eps)})`,
    ivar: () => `1 / ${format(at("sqrtvar"))}`,
    xhat: () => `${format(at("xmu"))} · ${bare(at("ivar"))}`,
    gammax: () => `${format(at("gamma"))} · ${bare(at("xhat"))}`,
    out: () => `${format(at("gammax"))} + ${bare(at("beta"))}`,
    dbeta: () => sum(column("dout").map(bare)),
    dxhat: () => `${format(at("gamma"))} · ${bare(at("dgammax"))}`,
    dgamma: () => products("dgammax", "xhat"),
    dxmu1: () => `${format(at("dxhat"))} · ${bare(at("ivar"))}`,
    divar: () => products("dxhat", "xmu"),
    dsqrtvar: () => `−${bare(at("divar"))} / ${format(at("sqrtvar"))}²`,
    dvar: () => `${format(at("dsqrtvar"))} / (2 · ${format(at("sqrtvar"))})`,
    dsq: () => `${format(at("dvar"))} / ${n}`,
    dxmu2: () => `2 · ${bare(at("xmu"))} · ${bare(at("dsq"))}`,
    dxmu: () => `${format(at("dxmu1"))} + ${bare(at("dxmu2"))}`,
    dmu: () => `−(${sum(column("dxmu").map(bare))})`,
    dx2: () => `${format(at("dmu"))} / ${n}`,
    dx: () => `${format(at("dx1"))} + ${bare(at("dx2"))}`,
  };
  if (name === "column") {
    const shown = jacobian(v, f).map((row, k) => `${bare(row[i])}·${bare(v.dout[k][f])}`);
    return `Column ${i} times dout: ${sum(shown)} = ${format(v.dx[i][f])} = dx[${i}, ${f}]`;
  }
  return `${name}[${isMatrix(v[name]) ? `${i}, ` : ""}${f}] = ${texts[name]()} = ${format(at(name))}`;
}
