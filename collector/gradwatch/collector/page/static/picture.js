// Ranks by steps: one drawing of states, one of magnitudes, and marks, all on one axis.

import { h, number, Part, ranges } from "./dom.js";
import { incidentHref } from "./fleet.js";

// More lines than this cannot be told apart: several ranks then share one, and the worst is shown.
const MAX_LINES = 256;
const LINE_PX = 16;
const MAX_HEIGHT_PX = 420;
const WORST = ".xcsb";
const WORDS = { ".": "nothing heard", x: "ended", c: "clean", s: "update skipped", b: "not finite" };
const NAMES = { x: "ended", c: "clean", s: "skipped", b: "bad" };
// From small to large: dark blue over green to yellow, told apart also in grey.
const SCALE = [[38, 28, 84], [46, 72, 136], [38, 115, 142], [33, 157, 133], [98, 194, 89], [199, 222, 45], [253, 231, 37]];
// Stands for the logarithm of 0.
const ZERO = -300;

export class Picture {
  constructor() {
    this.states = h("canvas", { tabindex: "0", role: "img", "data-key": "states", "aria-label": "States of the ranks by step; arrow keys move the cursor" });
    this.magnitudes = h("canvas", { role: "img", "aria-label": "Largest gradient of each rank by step" });
    this.cursors = [h("div.cursor", { hidden: true }), h("div.cursor", { hidden: true })];
    this.line = h("div.cursor.row", { hidden: true });
    this.borders = new Part("div");
    this.marks = new Part("div");
    this.marks.element.className = "lane";
    this.axis = new Part("div");
    this.axis.element.className = "axis";
    this.range = new Part("span");
    this.readout = h("p.readout", { "aria-live": "polite" });
    this.plots = [
      h("div.plot", {}, this.states, this.borders.element, this.cursors[0], this.line),
      h("div.plot", {}, this.magnitudes, this.cursors[1]),
    ];
    const legend = h("ul.legend", {}, ["bad", "skipped", "clean", "ended"].map((name) => h("li", {}, h(`span.swatch.${name}`), { bad: "not finite", skipped: "update skipped by the guard", clean: "clean", ended: "process ended" }[name])));
    this.empty = h("p", {}, "No step has been reported yet.");
    this.drawing = h("div.picture", { hidden: true },
      h("h3", {}, "Ranks by step"), this.plots[0], this.marks.element, this.axis.element, legend,
      h("h3", {}, "Largest gradient, ", this.range.element), this.plots[1], this.readout);
    this.element = h("section", {}, h("h2", {}, "How it went"), this.empty, this.drawing);
    this.at = null;
    for (const plot of this.plots) {
      plot.addEventListener("pointermove", (event) => this.#point(event, plot));
      plot.addEventListener("pointerleave", () => this.#put(null));
    }
    this.states.addEventListener("keydown", (event) => this.#key(event));
    this.states.addEventListener("focus", () => this.at ?? this.#put({ column: this.data.columns - 1, line: 0 }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  show(picture) {
    this.data = picture;
    this.lines = grouped(picture.ranks, new Set(picture.segments.map((one) => one.first_column)));
    const nothing = picture.columns === 0 || this.lines.length === 0;
    this.empty.hidden = !nothing;
    this.drawing.hidden = nothing;
    if (nothing) return;
    this.#draw();
    const place = (column) => `${(100 * (column + 0.5)) / picture.columns}%`;
    this.borders.show([picture.segments, picture.columns], ([segments]) => segments.slice(1).map((one) => moved(h("div.segment", { title: name(one) }), `${(100 * one.first_column) / picture.columns}%`)));
    this.marks.show([picture.incidents, picture.checkpoints, picture.decisions, picture.columns], () => [
      ...picture.checkpoints.filter((one) => one.column !== null).map((one) => moved(h(`span.checkpoint.${one.verdict}`, { tabindex: "0", role: "img", title: words(one), "aria-label": words(one) }, { good: "●", bad: "✕", unknown: "○", quarantined: "⊘" }[one.verdict]), place(one.column))),
      ...picture.decisions.filter((one) => one.column !== null && one.action !== "ignore" && one.action !== "none").map((one) => moved(h("span.decision", { tabindex: "0", role: "img", title: `decided: ${one.action}, ${one.outcome}`, "aria-label": `decided: ${one.action}, ${one.outcome}` }, "◆"), place(one.column))),
      ...picture.incidents.filter((one) => one.column !== null).map((one) => moved(h("a.incident", { href: incidentHref(one.id), "data-key": `mark-${one.id}`, title: `incident at step ${one.step}: ${one.cause ?? "cause unknown"}`, "aria-label": `Incident at step ${one.step}` }, "!"), place(one.column))),
    ]);
    this.axis.show([picture.segments, picture.columns], ([segments]) => segments.map((one, index) => {
      const wide = segments.length === 1 || one.columns > picture.columns / 6;
      const label = index === 0 ? number(one.first_step) : wide ? `${name(one)}: ${number(one.first_step)}` : "";
      return moved(h("span.start", {}, label), `${(100 * one.first_column) / picture.columns}%`);
    }).concat(moved(h("span.end", {}, `step ${number(segments.at(-1).last_step)}`), "100%")));
    this.range.show([this.low, this.high], ([low, high]) => [low === null ? "none known" : `from ${power(low)} (dark) to ${power(high)} (bright)`]);
    if (this.at) this.#put(this.at);
  }

  #draw() {
    if (!this.data || this.data.columns === 0) return;
    const style = getComputedStyle(document.documentElement);
    const colors = Object.fromEntries(Object.entries(NAMES).map(([letter, word]) => [letter, rgb(style.getPropertyValue(`--cell-${word}`))]));
    const { columns } = this.data;
    const height = Math.min(MAX_HEIGHT_PX, Math.max(LINE_PX, this.lines.length * LINE_PX));
    paint(this.states, columns, this.lines, height, (line, column) => colors[line.states[column]]);
    const known = this.lines.flatMap((line) => line.magnitudes).filter((value) => value !== null && value > ZERO);
    this.low = known.length ? known.reduce((a, b) => Math.min(a, b)) : null;
    this.high = known.length ? known.reduce((a, b) => Math.max(a, b)) : null;
    const span = Math.max(1e-9, this.high - this.low);
    paint(this.magnitudes, columns, this.lines, height, (line, column) => {
      if (line.states[column] === "b") return colors.b;
      const value = line.held[column];
      return value === null ? undefined : scaled((Math.max(value, this.low) - this.low) / span);
    });
  }

  #point(event, plot) {
    const box = plot.firstChild.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.data.columns);
    const line = Math.floor(((event.clientY - box.top) / box.height) * this.lines.length);
    this.#put({ column, line });
  }

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [0, -16], PageDown: [0, 16], Home: [-1e9, 0], End: [1e9, 0] }[event.key];
    if (!steps) return;
    event.preventDefault();
    const at = this.at ?? { column: this.data.columns - 1, line: 0 };
    this.#put({ column: at.column + steps[0], line: at.line + steps[1] });
  }

  #put(at) {
    this.at = at;
    for (const cursor of [...this.cursors, this.line]) cursor.hidden = at === null;
    if (at === null) {
      this.readout.textContent = "";
      return;
    }
    const column = Math.min(Math.max(at.column, 0), this.data.columns - 1);
    const place = Math.min(Math.max(at.line, 0), this.lines.length - 1);
    this.at = { column, line: place };
    for (const cursor of this.cursors) cursor.style.left = `${(100 * (column + 0.5)) / this.data.columns}%`;
    this.line.style.top = `${(100 * (place + 0.5)) / this.lines.length}%`;
    const line = this.lines[place];
    const segment = this.data.segments.findLast((one) => one.first_column <= column) ?? this.data.segments[0];
    const first = segment.first_step + (column - segment.first_column) * segment.stride;
    const last = Math.min(first + segment.stride - 1, segment.last_step);
    const magnitude = line.held[column];
    this.readout.textContent = `${line.name}, ${name(segment)}, step ${first === last ? number(first) : `${number(first)}–${number(last)}`}: ${WORDS[line.states[column]]}${magnitude === null ? "" : `, gradient ${power(magnitude)}`}`;
  }
}

/** The lines that are drawn: a rank each, or several of which the worst is shown. */
export function grouped(ranks, begins) {
  const share = Math.ceil(ranks.length / MAX_LINES);
  const lines = [];
  for (let begin = 0; begin < ranks.length; begin += share) {
    const part = ranks.slice(begin, begin + share);
    const first = part[0];
    const numbers = ranges([first.rank, ...(part.at(-1).last_rank > first.rank ? range(first.rank + 1, part.at(-1).last_rank) : [])]);
    const nodes = new Set(part.map((one) => one.node));
    const states = share === 1 ? first.states : merged(part.map((one) => one.states));
    const magnitudes = share === 1 ? first.magnitudes : first.magnitudes.map((_, column) => largest(part.map((one) => one.magnitudes[column])));
    lines.push({ name: `rank ${numbers} on ${nodes.size === 1 ? first.node : `${nodes.size} nodes`}`, states, magnitudes, held: held(states, magnitudes, begins) });
  }
  return lines;
}

const range = (from, to) => Array.from({ length: to - from + 1 }, (_, place) => from + place);
const largest = (values) => values.reduce((a, b) => (b === null ? a : a === null ? b : Math.max(a, b)), null);

function merged(rows) {
  let text = "";
  for (let column = 0; column < rows[0].length; column += 1) {
    let worst = ".";
    for (const row of rows) if (WORST.indexOf(row[column]) > WORST.indexOf(worst)) worst = row[column];
    text += worst;
  }
  return text;
}

/** Magnitudes are sampled: between two samples of finite gradients of an attempt the one before stands. */
function held(states, magnitudes, begins) {
  let last = null;
  return magnitudes.map((value, column) => {
    if (begins.has(column)) last = null;
    last = states[column] === "b" || states[column] === "x" || states[column] === "." ? null : (value ?? last);
    return value ?? last;
  });
}

function paint(canvas, columns, lines, height, color) {
  if (canvas.width !== columns || canvas.height !== lines.length) Object.assign(canvas, { width: columns, height: lines.length });
  canvas.style.height = `${height}px`;
  const image = new ImageData(columns, lines.length);
  for (let line = 0; line < lines.length; line += 1) {
    for (let column = 0; column < columns; column += 1) {
      const known = color(lines[line], column);
      if (known) image.data.set([...known, 255], 4 * (line * columns + column));
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function scaled(share) {
  const at = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
  const low = Math.min(Math.floor(at), SCALE.length - 2);
  return SCALE[low].map((value, place) => Math.round(value + (at - low) * (SCALE[low + 1][place] - value)));
}

const rgb = (text) => [1, 3, 5].map((place) => parseInt(text.trim().slice(place, place + 2), 16));
const power = (logarithm) => (logarithm <= ZERO ? "0" : (10 ** logarithm).toExponential(1));
const name = (segment) => `generation ${segment.generation}${segment.attempt ? `, attempt ${segment.attempt}` : ""}`;
const words = (checkpoint) => `checkpoint of step ${checkpoint.step}: ${checkpoint.verdict}`;

function moved(element, left) {
  element.style.left = left;
  return element;
}
