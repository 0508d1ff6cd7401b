// One incident: the verdict first, then what it rests on.

import { getAudit, getBoundary, getIncident } from "./api.js";
import { h, number, Part, ranges, since, table } from "./dom.js";
import { jobHref, status } from "./fleet.js";
import { auditTable } from "./job.js";

export class Incident {
  constructor(id) {
    this.id = id;
    this.title = `Incident ${id}`;
    this.trail = [["all jobs", "#/"], [`incident ${id}`]];
    this.parts = Object.fromEntries(["verdict", "facts", "likely", "chain", "boundary", "flight", "decisions", "audit"].map((name) => [name, new Part("section")]));
    this.element = h("div", {}, Object.values(this.parts).map((part) => part.element));
  }

  async load() {
    const incident = await getIncident(this.id);
    // It is read from the log of events, and changes with the incident only.
    const now = JSON.stringify([incident.status, incident.last_round, incident.first]);
    if (now !== this.boundaryOf) {
      this.boundary = await getBoundary(this.id);
      this.boundaryOf = now;
    }
    const { boundary } = this;
    const audit = incident.decisions.length ? await getAudit(incident.job) : [];
    return { incident, boundary, audit };
  }

  show({ incident, boundary, audit }) {
    const { parts } = this;
    const decided = new Set(incident.decisions.map((one) => one.id));
    parts.verdict.show(pick(incident, "title verdict status cause job opened_at confirmed_at closed_at close_reason"), verdict);
    parts.facts.show(pick(incident, "first origins tie generation attempt step round"), facts);
    parts.likely.show(incident.likely, likely);
    parts.chain.show(pick(incident, "first cause status clean_ranks unknown_ranks unknown_reasons contaminated_ranks origins decisions verdict"), chain);
    parts.boundary.show(boundary, boundaryTable);
    parts.flight.show(incident.flight, flight);
    parts.decisions.show(incident.decisions, decisions);
    parts.audit.show(audit.filter((one) => decided.has(one.about)), auditTable);
  }
}

const pick = (from, names) => Object.fromEntries(names.split(" ").map((name) => [name, from[name]]));

function verdict(incident) {
  return [
    h("h2.headline", {}, incident.title),
    h("div.verdict.card", {}, incident.verdict.map((text) => h("p", {}, text))),
    h("p", {}, status(incident.status), " ", h("span.badge.quiet", {}, (incident.cause ?? "cause unknown").replaceAll("_", " ")), " in job ",
      h("a", { href: jobHref(incident.job), "data-key": "job" }, incident.job), ", opened ", since(incident.opened_at),
      incident.closed_at ? [", closed ", since(incident.closed_at), ` (${incident.close_reason.replaceAll("_", " ")})`] : null),
  ];
}

function facts({ first, origins, tie, generation, attempt, step, round }) {
  if (first === null) return h("dl.facts", {}, fact("step", number(step)), fact("round", number(round)), fact("generation", number(generation)), fact("first rank", "no rank is to blame, or it is not known"));
  const rows = [
    ["rank", tie ? `${ranges(origins.map((one) => one.rank))} (a tie)` : number(first.rank)],
    ["node", first.node],
    ["device", [first.device, first.device_id].filter(Boolean).join(", ") || "–"],
    ["step, round", `${number(first.step)}, ${number(first.round)}`],
    ["micro-batch", number(first.microbatch)],
    ["began in", first.phase ?? "not known"],
    ["parameter", first.parameter ?? "not known"],
    ...(first.gradient !== null && first.gradient !== first.parameter ? [["gradient that arrived first", first.gradient]] : []),
    ...(first.bad_weights.length ? [["weights that are not finite", first.bad_weights.map((one) => one.name).join(", ")]] : []),
    ...(first.model === null ? [] : [["model", `${first.model.ordinal} (${first.model.module_class}), its step ${number(first.model_step)}`]]),
    ...(first.group === null ? [] : [["process group", `rank ${ranges(first.group)}`]]),
    ...(first.loss === null ? [] : [["loss", short(first.loss)]]),
    ["value", first.value === null ? "–" : `${first.value}${first.count === null ? "" : ` in ${number(first.count)} of ${number(first.numel)}`}`],
    ["arrived as number", first.backward_position === null ? "–" : number(first.backward_position + 1)],
    ["batch", first.batch === null ? "not tagged" : JSON.stringify(first.batch)],
    ["generation, attempt", `${number(generation)}, ${number(attempt)}`],
  ];
  const replay = first.replay;
  return [
    h("h2", {}, "Where it began"),
    h("dl.facts", {}, rows.map(([term, value]) => fact(term, value))),
    replay === null && first.operator === null ? null : h("div.card.below", {},
      first.operator === null ? h("h3", {}, "No operator is named") : h("h3", {}, "Operator ", h("code", {}, first.operator)),
      first.source === null ? null : h("p", {}, "at ", h("code", {}, first.source), replay?.code ? [": ", h("code", {}, replay.code)] : null),
      replay?.module ? h("p", {}, `in module ${replay.module}${replay.module_class ? ` (${replay.module_class})` : ""}`) : null,
      replay?.inputs.length ? table("What went into it.", ["input", "shape", "from", "to", "not finite"], replay.inputs.map((one, place) => ({
        cells: [`${place} (${one.dtype})`, `[${one.shape.join(", ")}]`, short(one.min), short(one.max), number(one.nonfinite)],
      }))) : null,
      ...(replay?.missing ?? []).map((text) => h("p.soft", {}, sentence(text)))),
  ];
}

const fact = (term, value) => h("div", {}, h("dt", {}, term), h("dd", {}, value));
const short = (value) => (typeof value === "number" ? Number(value.toPrecision(4)).toString() : value);

function likely(guesses) {
  if (!guesses.length) return [];
  return [h("h2", {}, "What is likely behind it"), h("ol.card", {}, guesses.map((one) => h("li", {},
    h("strong", {}, one.kind.replaceAll("_", " ")), `: ${sentence(one.because)} `, h("span.soft", {}, sentence(one.remedy)))))];
}

const sentence = (text) => (text.endsWith(".") ? text : `${text}.`);

// Causes of which gradients tell, and that a reduction of gradients spreads; null: not known.
const SPREADS = new Set(["input", "forward", "loss", "backward", null]);

function chain(incident) {
  const { first } = incident;
  if (first === null) return [];
  const steps = [];
  const add = (what, ...text) => steps.push(h(steps.length ? "li" : "li.origin", {}, h("span.what", {}, what), ...text));
  const isPart = first.group !== null || first.exchanged;
  const named = first.bad_weights.length > 0;
  if (first.phase === "input") add(isPart ? "what entered its part" : "the batch", isPart ? "was not finite: it may have come from another rank" : "was not finite before the model saw it");
  if (first.phase === "parameter") add("the weights", "were not finite before this step");
  if (first.phase === "update") add("the update", named ? "made weights non-finite" : "was given a gradient that was not finite");
  if (first.operator !== null) add("operator", h("code", {}, first.operator), first.source === null ? "" : ` at ${first.source}`);
  if (first.operator !== null && (first.replay?.module || first.module)) add("module", h("code", {}, first.replay?.module || first.module), ` (${first.replay?.module_class ?? first.module_class ?? "class unknown"})`);
  const parameter = h("code", {}, first.parameter ?? "not known");
  const where = `on rank ${first.rank}, ${first.node}`;
  if (incident.cause === "replica_divergence") add("weights", parameter, ` are not those of the other ranks ${where}`);
  else if (incident.cause === "optimizer_state") add("gradient", parameter, ` was finite, and too large for the optimizer's state, ${where}`);
  else if (named || first.parameter !== null || first.phase !== "parameter") add(named ? "weight on the first rank" : "gradient on the first rank", parameter, ` turned ${first.value ?? "non-finite"} ${where}`);
  const others = incident.origins.filter((one) => one.rank !== first.rank).map((one) => one.rank);
  if (others.length) add("in the same round also", `rank ${ranges(others)}`);
  // Weights are the same on all ranks without it, and a finite gradient spreads nothing.
  const spreads = SPREADS.has(incident.cause);
  if (spreads) add("all-reduce", incident.clean_ranks.length ? `met the finite gradients of rank ${ranges(incident.clean_ranks)}, and spread it to all` : "spread it to all ranks");
  const skipped = incident.verdict.find((text) => text.includes("guard skipped"));
  if (incident.contaminated_ranks.length) add("contaminated by the update", `rank ${ranges(incident.contaminated_ranks)}`);
  else if (skipped) add("the update", skipped);
  else if (spreads) add("the update", "no other rank was bad afterwards");
  if (incident.unknown_ranks.length) add("not known", `rank ${ranges(incident.unknown_ranks)}: ${[...new Set(Object.values(incident.unknown_reasons))].join(", ").replaceAll("_", " ")}`);
  return [h("h2", {}, "How it spread"), h("ol.chain", {}, steps)];
}

function boundaryTable(boundary) {
  const heads = ["parameter", "module", "gradient", "arrived as"];
  const rows = boundary.parameters.map((one) => ({
    name: `tr.${one.state}${one.first ? ".first" : ""}`,
    cells: [h("code", {}, one.name), one.module_class ?? "–", one.state === "clean" ? "clean" : one.state === "unknown" ? "not listed as bad" : `${one.value ?? "non-finite"}${one.count === null ? "" : ` in ${number(one.count)} of ${number(one.numel)}`}`,
      one.backward_position === null ? "–" : number(one.backward_position + 1)],
  }));
  const counts = boundary.clean_before === null ? [] : [`${number(boundary.clean_before)} gradients had arrived clean before the first bad one`];
  if (boundary.bad !== null) counts.push(`${number(boundary.bad)} of ${boundary.total === null ? "its" : number(boundary.total)} parameters were bad`);
  return [
    h("h2", {}, "Parameters where clean turns into bad"),
    rows.length ? table(`In the order of the backward pass on rank ${boundary.rank}. ${counts.join("; ")}.`, heads, rows) : null,
    ...boundary.missing.map((text) => h("p.soft", {}, text)),
  ];
}

function flight(told) {
  if (told === null || told.steps.length < 2) return [];
  const steps = told.steps.map((one) => one.step);
  const series = [
    ["loss", told.steps.map((one) => one.loss)],
    ["loss scale", told.steps.map((one) => one.loss_scale)],
    ["learning rate", told.steps.map((one) => one.learning_rate)],
    ["largest gradient", told.steps.map((one) => one.magnitude)],
    ...told.parameters.slice(0, 9).map((name, place) => [name, told.steps.map((one) => one.magnitudes[place])]),
  ].filter(([, values]) => values.some((value) => value !== null));
  return [h("h2", {}, "How it came to this"),
    h("p.soft", {}, `The last ${told.steps.length} rounds on the first rank. Red: not finite.`),
    h("div.charts", {}, series.map(([name, values]) => chart(name, steps, values)))];
}

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** One line over the steps; logarithmic where it spans more than two orders of magnitude. */
function chart(name, steps, values) {
  const finite = values.filter((value) => typeof value === "number");
  const positive = finite.filter((value) => value > 0);
  const logarithmic = positive.length === finite.length && finite.length > 1 && Math.max(...finite) > 100 * Math.min(...finite);
  const scale = logarithmic ? Math.log10 : (value) => value;
  const [low, high] = finite.length ? [scale(Math.min(...finite)), scale(Math.max(...finite))] : [0, 1];
  const x = (place) => (100 * place) / Math.max(1, values.length - 1);
  const y = (value) => 38 - (36 * (scale(value) - low)) / (high - low || 1);
  const drawing = svg("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": `${name} from ${short(values[0])} to ${short(values.at(-1))}` });
  const points = values.map((value, place) => (typeof value === "number" ? `${x(place)},${y(value)}` : null)).filter(Boolean);
  drawing.append(svg("polyline", { points: points.join(" ") }));
  values.forEach((value, place) => {
    if (typeof value === "string") drawing.append(svg("line", { x1: x(place), x2: x(place), y1: 0, y2: 40 }));
  });
  return h("figure.chart", {}, h("figcaption", {}, h("code", {}, name), logarithmic ? " (logarithmic)" : ""), drawing,
    h("div.ends", {}, h("span", {}, `step ${number(steps[0])}: ${short(values[0]) ?? "–"}`), h("span", {}, `${number(steps.at(-1))}: ${short(values.at(-1)) ?? "–"}`)));
}

function decisions(all) {
  if (!all.length) return [];
  return [h("h2", {}, "What was decided about it"), ...all.map((one) => h("div.card", {},
    h("h3", {}, `${one.action}: ${one.outcome.replaceAll("_", " ")}`),
    h("p", {}, sentence(`Since ${one.reason}`)), h("p", {}, sentence(`Effect: ${one.effect}`)),
    one.concluded ? h("p", {}, `Came of it: ${one.concluded}.`) : null,
    h("p.soft", {}, one.rule ? `rule ${one.rule}, ` : "", `policy ${one.policy_hash}, decision `, h("code", {}, one.id))))];
}
