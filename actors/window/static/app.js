// Ties the page together: the stream, the key, how old the data is, and who draws what.

import { setAttribute, setShown, setText } from "./dom.js";
import { duration, known } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { Tiles } from "./series.js";
import { Stream } from "./stream.js";
import { showState, updateBalance, updateCoordinators, updateEvents, updateReplicas } from "./tables.js";

const KEY = "octavo-key";
const OLD_S = 5; // from then on the supervisor's word counts as old
const at = (id) => document.getElementById(id);

const heat = new HeatMap({ table: at("heat"), summary: at("load-summary"), detail: at("cell"), legend: at("legend"), numbers: at("numbers") });
const tiles = new Tiles(at("tiles"));
let last = null;
let received = 0;
let state = "connecting";

const WORDS = { connecting: "connecting", live: "live", lost: "connection lost", locked: "key wanted", full: "no place", hidden: "paused" };

function show(snapshot) {
  last = snapshot;
  received = Date.now();
  const { cluster } = snapshot;
  setText(at("model"), cluster.model || "\u00a0");
  const title = `${cluster.model || "Octavo"}: ${cluster.state}`;
  if (document.title !== title) document.title = title;
  showState(at("state"), cluster.state);
  setText(at("epoch"), cluster.map_epoch === null ? "–" : String(cluster.map_epoch));
  setText(at("uptime"), duration(cluster.uptime_s));
  tiles.update(snapshot, received);
  heat.update(snapshot);
  updateReplicas(at("replicas").tBodies[0], at("replicas-note"), snapshot);
  updateCoordinators(at("coordinators"), at("coordinators-note"), snapshot);
  updateBalance({ note: at("balance-note"), epochs: at("epochs"), moves: at("moves"), none: at("moves-none") }, snapshot);
  updateEvents(at("events"), at("events-none"), snapshot);
  const seen = snapshot.source === "ingress" ? "as one front door sees it; times to and between tokens are its own" : "as the supervisor sees it";
  setText(at("source"), `${seen}${cluster.system_fingerprint ? ` · ${cluster.system_fingerprint}` : ""}`);
  age();
}

function age() {
  if (!last) return;
  const since = (Date.now() - received) / 1000;
  const { cluster } = last;
  const oldest = since + Math.max(cluster.age_s ?? 0, cluster.coordinators_age_s);
  setText(at("age"), oldest < 2 ? "now" : `${duration(oldest)} old`);
  document.body.classList.toggle("stale", state !== "live");
  const notes = [];
  if (state === "lost") notes.push(`The connection is lost. What is shown is ${duration(since)} old; trying again.`);
  else if (state === "full" || state === "hidden") notes.push("");
  else if (cluster.state === "unknown") notes.push("The supervisor does not answer. What serves goes on; replicas are shown as coordinators know them.");
  else if (known(cluster.age_s) && cluster.age_s > OLD_S) notes.push(`The supervisor last answered ${duration(cluster.age_s)} ago.`);
  if (state !== "full" && state !== "locked") notice(notes.join(" "));
}

function notice(text) {
  setText(at("notice"), text);
  setShown(at("notice"), Boolean(text));
}

function turn(name, detail) {
  if (name !== state || name === "full" || name === "locked") {
    state = name;
    setAttribute(at("connection"), "data-state", name);
    setText(at("connection"), WORDS[name]);
    setShown(at("key-form"), name === "locked");
    if (name === "locked") {
      const had = sessionStorage.getItem(KEY);
      sessionStorage.removeItem(KEY);
      setText(at("key-note"), had ? detail : "It is kept in this tab until the tab is closed, and sent to this server only.");
      at("key").focus();
      notice(had ? "The server does not take this key." : "This server asks for a key.");
    } else if (name === "full") notice(detail);
    else if (name === "lost" && !last) notice("The server does not answer; trying again.");
    else if (name === "live") notice("");
    setShown(at("forget"), sessionStorage.getItem(KEY) !== null);
    document.body.classList.toggle("stale", name !== "live");
  }
  age();
}

const events = new URL("dashboard/events", document.baseURI);
events.username = events.password = ""; // fetch takes no address with a password; the browser sends it all the same

const stream = new Stream({
  url: events,
  key: () => sessionStorage.getItem(KEY),
  onSnapshot: show,
  onState: turn,
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value);
  at("key").value = "";
  setShown(at("key-form"), false);
  notice("");
  stream.start();
});

at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  setShown(at("forget"), false);
  stream.stop();
  stream.start();
});

setInterval(age, 1000);
stream.start();
