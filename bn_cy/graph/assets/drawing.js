// The graph as SVG: what passes forward above the wires, what comes back below.
//
// Along the top runs the way of every value by itself; the mean and the variance are two detours. A
// `Drawing` is built for a shape and a width, and `update` writes numbers into what is there, so
// that the focus stays where it is.
"use strict";

// Column and row of every node, as in bn_cy/graph/draw.py.
const PLACES = {
  x: [0, 0], xmu: [1, 0], xhat: [2, 0], gammax: [3, 0], out: [4, 0],
  mu: [0, 1], sq: [1, 1], ivar: [2, 1], gamma: [3, 1], beta: [4, 1],
  var: [1, 2], sqrtvar: [2, 2],
};
const WIDE = { column: 186, row: 152, box: [108, 76], origin: [68, 56], size: [940, 434], font: 13 };
const NARROW = { column: 79, row: 116, box: [60, 56], origin: [36, 71], size: [388, 348], font: 11 };

// Which wires each way to the loss takes, by the gradient that comes back on them.
const ROAD = ["dgammax", "dxhat"];
const WAYS = {
  direct: [...ROAD, "dxmu1", "dx1"],
  mean: [...ROAD, "dxmu1", "dmu", "dx2"],
  variance: [...ROAD, "divar", "dsqrtvar", "dvar", "dsq", "dxmu2", "dx1"],
};

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Colour a cell of a heat map by a number, on the scale of its table.
function paint(cell, value, largest) {
  const strength = largest > 0 && Number.isFinite(value) ? Math.min(1, Math.abs(value) / largest) : 0;
  cell.style.setProperty("--t", strength.toFixed(3));
  cell.classList.toggle("positive", value > 0);
  cell.classList.toggle("negative", value < 0);
}

const NOISE = 1e-9; // what is smaller than this is rounding, and has no colour

const largestOf = (array) => Math.max(0, ...flat(array).filter(Number.isFinite).map(Math.abs));

class Drawing {
  constructor(host, graph, choose) {
    Object.assign(this, { host, graph, choose });
  }

  // Draw anew where the shape or the width has changed.
  fit(n, features, narrow) {
    const key = `${n} ${features} ${narrow}`;
    if (key === this.key) return;
    Object.assign(this, { key, n, features, look: narrow ? NARROW : WIDE, narrow });
    const [width, height] = this.look.size;
    this.root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Graph of batch norm" });
    this.root.append(svg("defs", {}, ...["forward", "backward"].map(arrowHead)));
    this.wires = new Map(this.graph.wires.map((wire) => [wire.gradient, this.drawWire(wire)]));
    this.wires.set("dout", this.drawLoss());
    this.root.append(this.drawLegend());
    this.nodes = new Map(this.graph.nodes.map((node) => [node.name, this.drawNode(node)]));
    this.host.replaceChildren(this.root);
  }

  place(name) {
    const { column, row, origin } = this.look;
    return [origin[0] + column * PLACES[name][0], origin[1] + row * PLACES[name][1]];
  }

  drawWire(wire) {
    const [start, end] = [this.place(wire.source), this.place(wire.target)];
    const [w, h] = this.look.box.map((side) => side / 2 + 4);
    const along = [Math.sign(end[0] - start[0]), Math.sign(end[1] - start[1])];
    const level = along[1] === 0, upright = along[0] === 0;
    const corner = level ? [w, 0] : upright ? [0, h] : [w * 0.62, h];
    const ends = [0, 1].map((k) => [start[k] + along[k] * corner[k], end[k] - along[k] * corner[k]]);
    // Forward lies above or to the left of the middle, backward below or to the right.
    const side = level ? [0, -1] : upright ? [-1, 0] : [-0.7, -0.7];
    const line = (offset, back) => {
      const [from, to] = [0, 1].map((k) => ends.map((pair, axis) => pair[k] + offset * side[axis]));
      return `M${(back ? to : from).join(" ")}L${(back ? from : to).join(" ")}`;
    };
    const middle = ends.map(([a, b]) => (a + b) / 2);
    return this.addWire(line(4), line(-4, true), middle, level ? "level" : upright ? "upright" : "diagonal");
  }

  // The gradient that comes from outside.
  drawLoss() {
    const [x, y] = this.place("out");
    const [w, h] = this.look.box.map((side) => side / 2 + 4);
    if (this.narrow) return this.addWire("", `M${x} 15L${x} ${y - h}`, [x, 11], "top");
    return this.addWire("", `M${x + w + 66} ${y}L${x + w} ${y}`, [x + w + 36, y], "level");
  }

  addWire(forward, backward, [x, y], kind) {
    const { font, box } = this.look;
    const paths = ["track", "forward", "backward"].map((name) =>
      svg("path", { class: name, d: name === "backward" ? backward : forward }));
    paths[1].setAttribute("marker-end", "url(#tip-forward)");
    paths[2].setAttribute("marker-end", "url(#tip-backward)");
    const level = this.narrow
      ? [[x, y - box[1] / 2 - 16], [x, y - box[1] / 2 - 5]] // above the boxes, one over the other
      : [[x, y - 10], [x, y + font + 5]];
    // Out of the way of the wire that runs across, and of the numbers above the lowest nodes.
    const lower = !this.narrow ? 0 : y < this.place("mu")[1] ? 13 : -10;
    const spots = {
      level: { anchor: ["middle", "middle"], at: level },
      upright: { anchor: ["end", "start"], at: [[x - 9, y + font / 3 + lower], [x + 9, y + lower]] },
      top: { anchor: ["end", "middle"], at: [[x, y], [x, y]] },
      diagonal: { anchor: ["end", "start"], at: [[x - 8, y - 6], this.narrow ? [x - 9, y + 31] : [x + 8, y + font]] },
    }[kind];
    const text = (k, name, dy) => svg("text", {
      class: name, x: spots.at[k][0], y: spots.at[k][1] + dy, "text-anchor": spots.anchor[k],
      "font-size": name === "backward name" ? font - 1 : font,
    });
    // Where it is narrow there is room for the numbers alone.
    const parts = {
      value: text(0, "forward", 0), name: text(1, "backward name", 0),
      gradient: text(1, "backward", this.narrow ? (kind === "upright" ? 4 : 0) : font + 2),
    };
    const group = svg("g", { class: "wire", "aria-hidden": "true" }, ...paths, ...Object.values(parts));
    this.root.append(group);
    return { group, forward: paths[1], backward: paths[2], ...parts };
  }

  drawLegend() {
    const { column, row, origin, font, box } = this.look;
    const [x, y] = [origin[0] + 3 * column - box[0] / 2, origin[1] + 2 * row];
    const line = (dy, direction, text) => svg("g", { class: "wire legend" },
      svg("path", { class: direction, d: `M${x} ${y + dy}h22`, "marker-end": `url(#tip-${direction})` }),
      svg("text", { class: direction, x: x + 30, y: y + dy + font / 3, "font-size": font }, text));
    return svg("g", { "aria-hidden": "true" },
      line(-font, "forward", "value, forward"), line(font, "backward", "gradient, back"));
  }

  drawNode(node) {
    const [x, y] = this.place(node.name);
    const [w, h] = this.look.box;
    const { font } = this.look;
    const group = svg("g", { class: "node", role: "button", tabindex: 0, "data-node": node.name, transform: `translate(${x} ${y})` });
    const name = svg("text", { y: -h / 2 + font + 3, "font-size": font }, node.name);
    const check = svg("text", {
      class: "check", x: w / 2, y: h / 2 + font + 1,
      "font-size": font - 2, style: "text-anchor: end",
    });
    const plus = svg("g", { class: "plus", transform: `translate(${-w / 2} ${-h / 2})` },
      svg("circle", { r: font * 0.8 }), svg("text", { y: font * 0.38, "font-size": font + 2 }, "+"));
    const room = [(w - 18) / 2, h - font - 20];
    const thumbs = ["forward", "backward"].map((direction, k) => {
      const thumb = this.drawThumb(room, isPerFeature(node.name), direction);
      thumb.group.setAttribute("transform", `translate(${-w / 2 + 6 + k * (room[0] + 6)} ${-h / 2 + font + 10})`);
      return thumb;
    });
    group.append(svg("rect", { class: "box", x: -w / 2, y: -h / 2, width: w, height: h, rx: 7 }), name,
      ...thumbs.map((thumb) => thumb.group), check, plus);
    group.addEventListener("click", () => this.choose(node.name));
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.choose(node.name);
    });
    this.root.append(group);
    return { group, check, value: thumbs[0], gradient: thumbs[1], perFeature: isPerFeature(node.name) };
  }

  // A heat map in a node, with a line of its direction's colour below it.
  drawThumb([width, height], perFeature, direction) {
    const rows = perFeature ? 1 : this.n;
    const tall = perFeature ? Math.max(height / this.n, Math.min(height, 7)) : height / rows;
    const wide = width / this.features;
    const top = (height - tall * rows) / 2;
    const cells = Array.from({ length: rows * this.features }, (_, k) => svg("rect", {
      class: "cell", x: (k % this.features) * wide, y: top + Math.floor(k / this.features) * tall,
      width: wide * 0.92, height: tall * (tall > 4 ? 0.9 : 1),
    }));
    const mark = svg("rect", { class: "outline", width: wide * 0.92, height: tall * 0.9 });
    const numbers = svg("g", {}, ...cells, mark);
    const frame = svg("rect", { class: "frame", width, height });
    const question = svg("text", { x: width / 2, y: height / 2 + 4, "font-size": this.look.font });
    const rule = svg("path", { class: `rule ${direction}`, d: `M0 ${height + 4}h${width}` });
    const group = svg("g", { class: "thumb" }, frame, numbers, question, rule);
    return { group, cells, mark, numbers, frame, question, rule, wide, tall, top };
  }

  // Write a view into the drawing; page.js says what is in it.
  update(view) {
    this.root.classList.toggle("lit", Boolean(view.light));
    for (const [gradient, parts] of this.wires) this.updateWire(gradient, parts, view);
    for (const node of this.graph.nodes) this.updateNode(node, this.nodes.get(node.name), view);
  }

  updateWire(gradient, parts, view) {
    const wire = this.graph.wires.find((one) => one.gradient === gradient);
    const passed = wire && view.passed(wire);
    const back = view.cameBack(gradient);
    parts.forward.classList.toggle("hidden", !passed);
    parts.backward.classList.toggle("hidden", !back);
    parts.forward.classList.toggle("now", passed && view.now(wire, "forward"));
    parts.backward.classList.toggle("now", back && view.now(wire ?? { gradient }, "backward"));
    const digits = this.narrow ? 2 : 3;
    parts.value.textContent = passed ? view.show(wire.source, digits) : "";
    parts.name.textContent = back && !this.narrow ? gradient : "";
    parts.gradient.textContent = back ? view.show(gradient, digits) : "";
    const ways = Object.keys(WAYS).filter((way) => WAYS[way].includes(gradient) && [way, "all"].includes(view.light));
    parts.group.setAttribute("class", `wire ${ways.length ? "on" : ""} ${ways.length === 1 ? ways[0] : ""}`);
  }

  updateNode(node, parts, view) {
    const known = view.known(node.name), arrived = view.arrived(node.name);
    const classes = {
      asleep: !known, active: view.active === node.name, chosen: view.chosen === node.name,
      meeting: view.meeting === node.name,
    };
    for (const [name, on] of Object.entries(classes)) parts.group.classList.toggle(name, on);
    this.fill(parts.value, node.name, known, parts.perFeature, view);
    this.fill(parts.gradient, `d${node.name}`, arrived, parts.perFeature, view);
    const error = arrived ? view.error(node.name) : null;
    parts.check.classList.toggle("bad", error?.bad === true);
    parts.check.textContent = error === null ? "" : (error.bad ? "≠" : "✓") + (this.narrow ? "" : ` ${rough(error.distance)}`);
    parts.group.setAttribute("aria-pressed", String(classes.chosen));
    parts.group.setAttribute("aria-label", view.describe(node, known, arrived, error));
  }

  fill(thumb, name, shown, perFeature, view) {
    const hidden = view.hide === name;
    thumb.question.textContent = shown && hidden ? "?" : "";
    thumb.numbers.style.display = shown && !hidden ? "" : "none";
    thumb.frame.style.display = shown && !hidden ? "none" : "";
    thumb.rule.style.display = shown ? "" : "none";
    const drawn = [view.results[name], view.i, view.f];
    if (!shown || hidden || thumb.drawn?.every((part, k) => part === drawn[k])) return;
    thumb.drawn = drawn;
    const array = view.results[name];
    const values = flat(array), largest = Math.max(NOISE, largestOf(array));
    thumb.cells.forEach((cell, k) => paint(cell, values[k], largest));
    thumb.mark.setAttribute("x", view.f * thumb.wide);
    thumb.mark.setAttribute("y", thumb.top + (perFeature ? 0 : view.i) * thumb.tall);
  }
}

function arrowHead(direction) {
  return svg("marker", {
    id: `tip-${direction}`, class: direction, viewBox: "0 0 8 8", refX: 7, refY: 4,
    markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto",
  }, svg("path", { d: "M0 0L8 4L0 8z" }));
}
