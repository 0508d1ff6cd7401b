// What the collector tells, and the one thing that it can be asked to do.

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** No answer came; what the collector did with the request is not known. */
export class Unreachable extends Error {}

async function ask(path, options = {}) {
  let answer;
  let text;
  try {
    answer = await fetch(path, { cache: "no-cache", ...options });
    text = await answer.text();
  } catch {
    throw new Unreachable("no answer from the collector");
  }
  let told = null;
  try {
    told = JSON.parse(text);
  } catch {
    // It is said below by its status.
  }
  if (!answer.ok) throw new Refused(answer.status, detail(told) ?? `${answer.status} ${answer.statusText}`);
  return told;
}

function detail(told) {
  return typeof told?.detail === "string" ? told.detail : null;
}

const job = (name) => `/api/v1/jobs/${name.split("/").map(encodeURIComponent).join("/")}`;

export const getMe = () => ask("/api/v1/me");
export const getJobs = () => ask("/api/v1/jobs");
export const getJob = (name) => ask(job(name));
export const getPicture = (name) => ask(`${job(name)}/picture`);
export const getAudit = (name) => ask(`${job(name)}/audit?limit=10000`);
export const getIncidents = () => ask("/api/v1/incidents?limit=200");
export const getIncident = (id) => ask(`/api/v1/incidents/${encodeURIComponent(id)}`);
export const getBoundary = (id) => ask(`/api/v1/incidents/${encodeURIComponent(id)}/boundary`);

/** Roll a job back. The token is used for this once, and kept nowhere. */
export function rollBack(name, operator, token) {
  const headers = { "Content-Type": "application/json", "X-Gradwatch-Operator": operator };
  if (token) headers.Authorization = `Bearer ${token}`;
  return ask(`${job(name)}/rollback`, { method: "POST", headers, body: JSON.stringify({ to: "last-good" }) });
}
