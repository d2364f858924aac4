// Replicas, coordinators, moves and events: lists whose rows keep their place and change only where they differ.

import { el, keyed, setAttribute, setShare, setShown, setText } from "./dom.js";
import { bytes, clock, count, known, latency, percent, plural, rate, short } from "./format.js";

// A state is a sign and a word, never a colour alone.
const SIGNS = {
  ready: ["●", "good"],
  loading: ["◐", "busy"],
  starting: ["◐", "busy"],
  waiting: ["○", "busy"],
  draining: ["◌", "busy"],
  degraded: ["▲", "warn"],
  unplaced: ["▲", "warn"],
  refused: ["▲", "warn"],
  unknown: ["○", "busy"],
};
const BAD = ["✕", "bad"];
const STANDING_KIND = { probing: "warn", away: "warn", ejected: "bad", quarantined: "bad" };

export function showState(element, state) {
  const [sign, kind] = SIGNS[state] ?? BAD;
  setAttribute(element, "data-kind", kind);
  setText(element, `${sign} ${state || "unknown"}`);
}

// Rows become cards on a narrow screen: roles and labels are said, because such a table is none to a browser.
const cell = (label, kind) => el("td", { class: kind, role: "cell", "data-label": label });
const bar = () => el("span", { class: "bar", "aria-hidden": "true" }, el("span", {}));

function makeReplica(one) {
  const parts = { state: el("span", { class: "state" }), busyBar: bar(), busyText: el("span", { class: "number" }) };
  const cells = {
    experts: cell("experts"),
    layers: cell("layers"),
    node: cell("node"),
    memory: cell("memory", "n"),
    tokens: cell("tokens", "n"),
    inflight: cell("in flight", "n"),
    health: cell(null, "health"),
  };
  const busy = cell("busy", "n busy");
  busy.append(parts.busyBar, parts.busyText);
  const row = el(
    "tr",
    { role: "row" },
    el("th", { scope: "row", role: "rowheader", text: one.replica_id }),
    el("td", { role: "cell" }, parts.state),
    ...[cells.experts, cells.layers, cells.node, cells.memory, cells.tokens, cells.inflight, busy, cells.health],
  );
  row.parts = { ...parts, ...cells };
  return row;
}

function updateReplica(row, one) {
  const parts = row.parts;
  showState(parts.state, one.state);
  setAttribute(row, "data-state", one.state);
  setText(parts.experts, ranges(one.expert_ids));
  setText(parts.layers, one.first_layer === null ? "–" : `${one.first_layer}–${one.last_layer}`);
  setText(parts.node, one.node ? one.node.slice(0, 8) : "–");
  setAttribute(parts.node, "title", one.pid ? `${one.node}, ${one.address}, pid ${one.pid}` : one.node || null);
  const loading = one.state === "loading" && one.weight_bytes;
  setText(parts.memory, loading ? `${percent(one.loaded_bytes / one.weight_bytes)} of ${bytes(one.weight_bytes)}` : one.weight_bytes ? bytes(one.weight_bytes) : "–");
  setText(parts.tokens, short(one.tokens_total));
  setText(parts.inflight, count(one.num_inflight_tokens));
  setText(parts.busyText, percent(one.busy_share));
  setShare(parts.busyBar, one.busy_share);
  const told = one.reasons.some((reason) => reason.includes(one.standing));
  setText(parts.health, [...(told ? [] : [one.standing]), ...one.reasons].filter(Boolean).join("; ") || "–");
  setAttribute(parts.health, "data-kind", STANDING_KIND[one.standing] ?? null);
}

/** [0,1,2,5] as "0–2, 5". */
export function ranges(numbers) {
  const parts = [];
  for (const one of numbers) {
    const last = parts.at(-1);
    if (last && one === last[1] + 1) last[1] = one;
    else parts.push([one, one]);
  }
  return parts.map(([from, to]) => (from === to ? `${from}` : `${from}–${to}`)).join(", ") || "–";
}

export function updateReplicas(body, note, snapshot) {
  keyed(body, snapshot.replicas, (one) => one.replica_id, makeReplica, updateReplica);
  const states = new Map();
  for (const one of snapshot.replicas) states.set(one.state, (states.get(one.state) ?? 0) + 1);
  const told = [...states].map(([state, number]) => `${count(number)} ${state}`);
  if (snapshot.left_out.replicas) told.push(`${count(snapshot.left_out.replicas)} not shown`);
  setText(note, told.join(", ") || "none");
}

const FIGURES = [
  ["running", (one) => count(one.num_running)],
  ["waiting", (one) => (one.num_waiting ? `${count(one.num_waiting)}, ${latency(one.queue_s)}` : "0")],
  ["tokens/s", (one) => rate(one.generated_tokens_per_s)],
  ["preemptions", (one) => count(one.preemptions_total)],
  ["retries", (one) => count(one.expert_retries_total)],
  ["hedges", (one) => count(one.hedges_total)],
];

function makeCoordinator(one) {
  const parts = { state: el("span", { class: "state" }), epoch: el("span", { class: "quiet" }), bar: bar(), kv: el("span", { class: "number" }), detail: el("p", { class: "detail" }) };
  parts.figures = FIGURES.map(() => el("dd", {}));
  const card = el(
    "article",
    { class: "card", "aria-label": one.coordinator_id },
    el("div", { class: "card-head" }, el("h3", { text: one.coordinator_id }), parts.state, parts.epoch),
    el("p", { class: "kv" }, el("span", { class: "label", text: "KV" }), parts.bar, parts.kv),
    el("dl", { class: "figures" }, ...FIGURES.map(([name], place) => el("div", {}, el("dt", { text: name }), parts.figures[place]))),
    parts.detail,
  );
  card.parts = parts;
  return card;
}

function updateCoordinator(card, one, epoch) {
  const parts = card.parts;
  showState(parts.state, one.state);
  const behind = known(epoch) && one.map_epoch !== epoch;
  setText(parts.epoch, `epoch ${one.map_epoch}${behind ? `, the map is at ${epoch}` : ""} · ${one.kernel || "–"} · node ${one.node.slice(0, 8) || "–"}`);
  const share = one.kv_total ? one.kv_used / one.kv_total : null;
  setShare(parts.bar, share);
  setText(parts.kv, `${percent(share)} of ${count(one.kv_total)} × ${one.kv_block_size}`);
  FIGURES.forEach(([, text], place) => setText(parts.figures[place], text(one)));
  setText(parts.detail, one.detail);
  setShown(parts.detail, Boolean(one.detail));
}

export function updateCoordinators(parent, note, snapshot) {
  const epoch = snapshot.cluster.map_epoch;
  keyed(parent, snapshot.coordinators, (one) => one.coordinator_id, makeCoordinator, (card, one) => updateCoordinator(card, one, epoch));
  const hidden = snapshot.left_out.coordinators;
  setText(note, hidden ? `${count(hidden)} not shown` : snapshot.coordinators.length ? "" : "none");
}

export function updateBalance({ note, epochs, moves, none }, snapshot) {
  const { balance } = snapshot;
  const mode = balance.mode.replace("_", " ");
  const done = `${plural(balance.moves_total, "move")}, ${bytes(balance.moved_bytes_total)} loaded`;
  setText(note, balance.mode === "off" && !balance.moves_total ? "balancing is off" : `${mode}, ${balance.policy}: ${done}`);
  const seen = snapshot.epochs.slice(-6).reverse();
  const epoch = (one) => `${one.epoch} since ${clock(one.at_s)}`;
  setText(epochs, seen.length ? `Epoch ${seen.map(epoch).join(", before it ")}` : "No map is known.");
  const told = ["failed", "done", "proposed"].flatMap((outcome) => balance[outcome].map((move) => ({ ...move, outcome })));
  told.sort((one, other) => (other.outcome === "proposed") - (one.outcome === "proposed") || other.at - one.at);
  const keys = new Map();
  const items = told.slice(0, 24).map((move) => {
    const key = `${move.outcome} ${move.at} ${move.kind} ${move.what} ${move.node_id}`;
    keys.set(key, (keys.get(key) ?? 0) + 1);
    return { ...move, key: `${key} ${keys.get(key)}` };
  });
  keyed(moves, items, (move) => move.key, makeMove, () => {});
  setShown(none, !items.length);
}

function makeMove(move) {
  const kind = { failed: "bad", done: "good", proposed: "busy" }[move.outcome];
  const sign = { failed: "✕ failed", done: "● done", proposed: "○ proposed" }[move.outcome];
  const where = move.node_id ? ` ${move.kind === "copy" ? "to" : "on"} ${move.node_id.slice(0, 8)}` : "";
  const size = move.num_bytes ? `, ${bytes(move.num_bytes)}` : "";
  return el(
    "li",
    {},
    el("p", { class: "what" }, el("span", { class: "state", "data-kind": kind, text: sign }), el("span", { text: `${move.kind.replaceAll("_", " ")} ${move.what}${where}${size}` }), el("time", { text: clock(move.at) })),
    el("p", { class: "why", text: move.error ? `${move.reason}; it failed: ${move.error}` : move.reason }),
  );
}

export function updateEvents(list, none, snapshot) {
  const counts = new Map();
  const items = snapshot.events.map((text) => {
    counts.set(text, (counts.get(text) ?? 0) + 1);
    return { text, key: `${text} ${counts.get(text)}` };
  });
  keyed(list, items.reverse(), (one) => one.key, makeEvent, () => {});
  setShown(none, !items.length);
}

function makeEvent({ text }) {
  const [, time, rest] = /^(\d\d:\d\d:\d\d) (.*)$/s.exec(text) ?? [null, "", text];
  return el("li", {}, el("time", { text: time }), el("span", { text: rest }));
}
