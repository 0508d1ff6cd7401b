// All jobs: what is wrong now comes first.

import { getIncidents, getJobs } from "./api.js";
import { h, number, Part, since, table } from "./dom.js";

const CLOSED_SHOWN = 30;

export const jobHref = (name) => `#/jobs/${name.split("/").map(encodeURIComponent).join("/")}`;
export const incidentHref = (id) => `#/incidents/${encodeURIComponent(id)}`;

export class Fleet {
  title = "All jobs";
  trail = [];

  constructor() {
    this.open = new Part("section");
    this.jobs = new Part("section");
    this.closed = new Part("section");
    this.element = h("div", {}, this.open.element, this.jobs.element, this.closed.element);
  }

  async load() {
    const [jobs, incidents] = await Promise.all([getJobs(), getIncidents()]);
    return { jobs, incidents };
  }

  show({ jobs, incidents }) {
    const open = incidents.filter((one) => one.status !== "closed").map(brief);
    const closed = incidents.filter((one) => one.status === "closed").slice(0, CLOSED_SHOWN).map(brief);
    document.title = open.length ? `(${open.length}) Gradwatch` : "Gradwatch";
    this.open.show(open, (all) => [
      h("h2", {}, all.length ? `Open incidents (${all.length})` : "Open incidents"),
      all.length ? all.map(card) : h("p.card", {}, "None. No gradient is non-finite now, as far as is known."),
    ].flat());
    this.jobs.show(jobs.map(row), (all) => [h("h2", {}, "Jobs"), all.length ? jobTable(all) : h("p.card", {}, "No job has reported yet.")]);
    this.closed.show(closed, (all) => (all.length ? [h("h2", {}, "Closed incidents"), ...all.map(card)] : []));
  }
}

function brief(incident) {
  const { id, job, status, cause, step, verdict, opened_at } = incident;
  return { id, job, status, cause, step, verdict: verdict[0] ?? "", opened_at };
}

export function card(incident) {
  return h(incident.status === "closed" ? "article.card" : "article.card.open", {},
    h("h3", {}, h("a", { href: incidentHref(incident.id), "data-key": `incident-${incident.id}` },
      `${incident.job}, step ${number(incident.step)}`), " ", status(incident.status), " ",
    h("span.badge.quiet", {}, incident.cause ? incident.cause.replaceAll("_", " ") : "cause unknown")),
    h("p", {}, incident.verdict),
    h("p.soft", {}, since(incident.opened_at), " · ", h("code", {}, incident.id)));
}

export function status(word) {
  const look = { closed: "quiet", suspected: "warn", confirmed: "bad", running: "good", ended: "quiet" }[word] ?? "quiet";
  return h(`span.badge.${look}`, {}, word);
}

function row(job) {
  const open = job.incidents.filter((one) => one.status !== "closed").length;
  return {
    name: job.job,
    status: job.halted === null ? job.status : "halted",
    step: job.step,
    behind: job.step !== null && job.slowest_step !== null ? job.step - job.slowest_step : null,
    ranks: `${job.ranks_watched} of ${job.world_size ?? "?"}`,
    whole: job.ranks_watched === job.world_size,
    open,
    incidents: job.incidents.length + job.incidents_left_out,
    good: job.last_good_checkpoint?.step ?? null,
    overhead: job.overhead.ratio,
    seen: job.last_seen,
  };
}

function jobTable(rows) {
  const heads = ["job", "status", "step", "ranks watched", "incidents", "good checkpoint", "overhead", "last seen"];
  const ordered = [...rows].sort((a, b) => b.open - a.open || (a.status === "running" ? 0 : 1) - (b.status === "running" ? 0 : 1) || a.name.localeCompare(b.name));
  return table("Jobs in trouble first, then those that run.", heads, ordered.map((one) => ({
    cells: [
      h("a", { href: jobHref(one.name), "data-key": `job-${one.name}` }, one.name),
      status(one.status),
      number(one.step) + (one.behind ? ` (slowest ${number(one.behind)} behind)` : ""),
      one.whole ? one.ranks : h("span.badge.warn", {}, one.ranks),
      one.open ? h("span.badge.bad", {}, `${one.open} open of ${one.incidents}`) : `${one.incidents}`,
      one.good === null ? "none" : `step ${number(one.good)}`,
      one.overhead === null ? "–" : `${(100 * one.overhead).toFixed(1)}%`,
      since(one.seen),
    ],
  })));
}
