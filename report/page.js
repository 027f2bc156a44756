"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const NAMES = { advantage: "advantage", log_ratio: "log-ratio", kl: "KL", logprob: "log-prob" };
const LONG = { log_ratio: "log-ratio to the reference", kl: "KL to the reference" };
const SIGNED = ["advantage", "log_ratio"], CHUNK = 100;
const NOISE = { log_ratio: 0.05 };  // under which 16-bit floats round: never the full colour
const $ = (id) => document.getElementById(id);
const seen = { view: "rows", step: null, outcome: "all", query: "", colour: null };
Object.assign(seen, { shown: [], at: 0 });  // what is in the list, and which of it is looked at

function make(tag, attributes, ...children) {  // text is text, whatever a model has said
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node[name] = value;
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const kind = (reward) => reward === null ? "none" : reward === 1 ? "right" : "wrong";
const word = (reward) => reward === null ? ""
  : reward % 1 ? String(Number(reward.toPrecision(3))) : kind(reward);
function verdicts(row) {  // of its attempts; of a pair: of the retry before training, and after
  if (row.before) return [row.before.right ? 1 : 0, row.after.right ? 1 : 0];
  return row.turns.map((turn) => turn.reward).filter((reward) => reward !== null);
}
function outcome(row) {
  const judged = verdicts(row).map(kind);
  const ends = judged.length > 1 ? [judged[0], judged[judged.length - 1]] : judged;
  return ends.join(" → ") || "not judged";
}
function text(row) {
  if (!row.text) {
    const parts = row.before ? [row.asked, row.failed, row.before.said, row.before.retry,
      row.after.said, row.after.retry] : row.turns.map((turn) => turn.told + turn.said.join(""));
    row.text = parts.join("\n").toLowerCase();
  }
  return row.text;
}
function asked(row) {  // the end of what the user said first, without its markup
  if (row.before) return row.asked;
  const lines = row.turns[0].told.replace(/<[^<>\n]{1,30}>/g, "\n").split("\n");
  const kept = lines.map((line) => line.trim()).filter((line) => line);
  const mine = kept.slice(kept.lastIndexOf("user") + 1);
  const said = mine.filter((line) => !/^(assistant|model)$/.test(line)).join(" ");
  return said.length > 160 ? "…" + said.slice(-160) : said;
}
const minus = (value) => String(value).replace("-", "−");
const sum = (values) => values.reduce((a, b) => a + b, 0);
const dots = (row) => verdicts(row).map((reward) =>
  make("span", { class: kind(reward) }, reward === 1 ? "● " : "○ "));

function rows() { return data[seen.view]; }
function ofStep() { return rows().filter((row) => seen.step === null || row.step === seen.step); }
function filtered() {
  const query = seen.query.toLowerCase();
  return ofStep().filter((row) => (seen.outcome === "all" || outcome(row) === seen.outcome)
    && (!query || text(row).includes(query)));
}
const scales = {};
function scale(name) {  // what is coloured to the full: 98 of 100 tokens have less
  const key = name + seen.step;
  if (!(key in scales)) {
    const values = ofStep().flatMap((row) => row.turns.flatMap((turn) => turn[name] || []));
    const sizes = values.map((value) => Math.abs(value || 0)).sort((a, b) => a - b);
    const most = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
    scales[key] = Math.max(most, NOISE[name] || 0);
  }
  return scales[key];
}
function paint(name, value) {
  if (!value) return "";
  const hue = !SIGNED.includes(name) ? "--much" : value > 0 ? "--more" : "--less";
  const share = Math.min(1, Math.abs(value) / scale(name));
  return `background: rgba(var(${hue}), ${(0.07 + 0.43 * share).toFixed(3)})`;
}
function legend() {
  const name = seen.colour;
  if (seen.view !== "rows" || !name) return $("legend").replaceChildren();
  const most = Number(scale(name).toPrecision(2));
  const ends = SIGNED.includes(name) ? ["--less", "--more"] : [null, "--much"];
  const stops = ends.map((hue) => hue ? `rgba(var(${hue}), .5)` : "transparent");
  const middle = ends[0] ? "transparent, " : "";
  const shades = `${stops[0]}, ${middle}${stops[1]}`;
  const bar = make("i", { style: `background: linear-gradient(90deg, ${shades})` });
  const low = ends[0] ? `−${most}` : "0", high = name === "logprob" ? `−${most}` : `${most}`;
  $("legend").replaceChildren(low, bar, high);
}

function told(said) {
  const box = make("pre", { class: "told" }, said.replace(/^\n+/, ""));
  if (said.split("\n").length <= 7 && said.length <= 700) return [box];
  box.classList.add("cut");
  const more = make("button", { class: "link", onclick: () => {
    more.textContent = box.classList.toggle("cut") ? "show all of it" : "show less";
    if (box.classList.contains("cut")) box.scrollTop = box.scrollHeight;
  } }, "show all of it");
  requestAnimationFrame(() => { box.scrollTop = box.scrollHeight; });  // the question is at its end
  return [box, more];
}
function said(turn) {
  const box = make("pre", { class: "said" });
  turn.said.forEach((piece, i) => {
    const values = turn[seen.colour] || [];
    const shown = piece === "" ? "▫" : piece.replace(/\n/g, "↵\n");  // ▫: a part of a letter
    const token = make("span", { style: paint(seen.colour, values[i]) || null }, shown);
    token.tip = { piece, values: measures.filter((name) => turn[name])
      .map((name) => [LONG[name] || NAMES[name], turn[name][i]]) };
    box.append(token);
  });
  return box;
}
function turnBlock(turn) {
  const sums = [turn.said.length === 1 ? "1 token" : `${turn.said.length} tokens`];
  const [advantage, ...others] = new Set(turn.advantage || []);
  if (others.length === 0 && advantage != null) sums.push(`advantage ${minus(advantage)}`);
  if (turn.kl && measures.includes("kl")) sums.push(`KL ${sum(turn.kl).toPrecision(2)}`);
  if (turn.cut) sums.push("cut off by the token limit");
  const verdict = make("span", { class: kind(turn.reward) }, word(turn.reward));
  const spoken = turn.said.length > 0;  // else somebody else's attempt is among what was told
  const head = (name, ...more) => make("div", { class: "who" }, make("b", {}, name), ...more);
  const user = spoken ? [head("told")] : [head("told, attempt and all", verdict)];
  user.push(make("div", { class: "box" }, ...told(turn.told)));
  const model = [head("model", verdict, sums.join(", "))];
  model.push(make("div", { class: "box" }, said(turn)));
  const blocks = [...(turn.told.trim() ? user : []), ...(spoken ? model : [])];
  return make("div", { class: "turn" }, ...blocks);
}
function pairBlock(row) {
  const half = (name, it) => make("div", {}, make("div", { class: "who" }, make("b", {}, name)),
    make("div", { class: "box" }, make("pre", { class: "said" }, it.said)),
    make("div", { class: "who" }, "then", make("span", { class: it.right ? "right" : "wrong" },
      it.right ? "right" : "wrong")),
    make("div", { class: "box" }, make("pre", { class: "said" }, it.retry)));
  return [make("div", { class: "turn" }, make("div", { class: "who" }, make("b", {}, "problem")),
    make("div", { class: "box" }, ...told(row.asked)),
    make("div", { class: "who" }, make("b", {}, "first attempt"),
      make("span", { class: "wrong" }, "wrong")),
    make("div", { class: "box" }, make("pre", { class: "said" }, row.failed))),
    make("div", { class: "two" }, half("reflection before training", row.before),
      half("reflection after training", row.after))];
}
function able(id, yes) { $(id).setAttribute("aria-disabled", String(!yes)); }  // keeps its focus
function detail() {
  const row = seen.shown[seen.at], count = seen.shown.length;
  able("up", seen.at > 0);
  able("down", seen.at < count - 1);
  $("place").textContent = !row ? "Nothing fits." : `${seen.at + 1} of ${count}`
    + (row.before ? ", retries: " : `${stepOf(row)}: `) + outcome(row);
  const blocks = !row ? [] : row.before ? pairBlock(row) : row.turns.map(turnBlock);
  $("turns").replaceChildren(...blocks);
}
function stepOf(row) { return "step" in row ? `, step ${row.step}` : ""; }
function item(row, i) {
  const step = seen.step === null ? make("span", { class: "step" }, stepOf(row).slice(2)) : "";
  const judged = verdicts(row), parts = judged.some((reward) => reward % 1);
  const last = row.before ? row.after.retry : row.turns[row.turns.length - 1].said.join("");
  return make("button", { "aria-current": String(i === seen.at), onclick: () => choose(i) },
    step, ...dots(row), parts ? judged.map(word).join(" → ") : outcome(row),
    make("div", { class: "what" }, asked(row)), make("div", { class: "answer" }, last.slice(0, 200)));
}
function list() {
  const some = Math.max(CHUNK, Math.ceil((seen.at + 1) / CHUNK) * CHUNK);
  const items = seen.shown.slice(0, some).map(item), left = seen.shown.length - items.length;
  if (left > 0) {
    items.push(make("button", { onclick: (event) => {
      event.target.remove();
      seen.shown.slice(some).forEach((row, i) => $("list").append(item(row, some + i)));
    } }, `${left} more`));
  }
  $("list").replaceChildren(...items);
}
function choose(i) {
  const old = $("list").querySelector('[aria-current="true"]');
  if (old) old.setAttribute("aria-current", "false");
  seen.at = i;
  const there = $("list").children[i];
  if (!there || !there.hasAttribute("aria-current")) list();  // it may be the one that shows more
  const now = $("list").children[i];
  if (now) { now.setAttribute("aria-current", "true"); now.scrollIntoView({ block: "nearest" }); }
  document.body.classList.add("open");
  detail();
  $("detail").scrollTop = 0;
}
function move(by) { if (seen.shown[seen.at + by]) choose(seen.at + by); }

function outcomes() {
  const pressed = $("outcomes").contains(document.activeElement);
  const counts = new Map([["all", 0]]);
  for (const row of ofStep()) {
    counts.set("all", counts.get("all") + 1);
    counts.set(outcome(row), (counts.get(outcome(row)) || 0) + 1);
  }
  if (!counts.has(seen.outcome)) counts.set(seen.outcome, 0);
  const order = ["all", ...[...counts.keys()].filter((name) => name !== "all").sort()];
  $("outcomes").replaceChildren(...order.map((name) => make("button", {
    "aria-pressed": String(name === seen.outcome),
    onclick: () => { seen.outcome = name; show(); } }, `${name} ${counts.get(name)}`)));
  if (pressed) $("outcomes").querySelector('[aria-pressed="true"]').focus();
}
function learns(row) {  // what a page opens at, where there is any
  return !row.before && row.turns.some((turn) => (turn.advantage || []).some(Boolean));
}
function steps() {
  return [...new Set(data.rows.map((row) => row.step))].filter((step) => step !== undefined);
}
function show() {
  const all = steps(), at = all.indexOf(seen.step);
  seen.shown = filtered();
  seen.at = Math.max(0, seen.shown.findIndex(learns));
  document.body.classList.remove("open");
  $("steps").hidden = seen.view !== "rows" || all.length < 2;
  $("colours").hidden = seen.view !== "rows" || !seen.colour;
  $("step").value = String(seen.step);
  able("before", at > 0);
  able("after", at >= 0 && at < all.length - 1);
  for (const button of $("views").children) {
    button.setAttribute("aria-pressed", String(button.value === seen.view));
  }
  outcomes(); legend(); list(); detail();
}
function toStep(step) { seen.step = step; show(); }
function stepBy(by) {
  const all = steps(), at = all.indexOf(seen.step);
  if (at >= 0 && at + by in all) toStep(all[at + by]);
}
function tip(event) {
  const token = event.target.closest && event.target.closest(".said span"), box = $("tip");
  box.hidden = !token;
  if (!token) return;
  const rows = token.tip.values.map(([name, value]) => make("tr", {}, make("td", {}, name),
    make("td", {}, value === null ? "" : minus(value))));
  box.replaceChildren(make("div", { class: "mono" }, JSON.stringify(token.tip.piece)),
    make("table", {}, ...rows));
  const at = token.getClientRects()[0], width = box.offsetWidth, height = box.offsetHeight;
  const above = at.top - height - 6;
  box.style.left = Math.max(6, Math.min(at.left, innerWidth - width - 6)) + "px";
  box.style.top = (above > 6 ? above : at.bottom + 6) + "px";
}

document.title = data.title;
document.querySelector("h1").textContent = data.title;
$("about").textContent = data.about;
if (data.pairs.length) {
  for (const [name, said] of [["rows", "rollouts"], ["pairs", "reflections, before and after"]]) {
    $("views").append(make("button", { value: name, onclick: () => {
      seen.view = name; seen.outcome = "all";
      seen.step = name === "rows" ? steps().pop() ?? null : null;
      show();
    } }, said), " ");
  }
}
const measures = Object.keys(NAMES).filter((name) => data.rows.some((row) =>
  row.turns.some((turn) => (turn[name] || []).some((value) => value))));
const choices = measures.map((name) => make("option", { value: name }, "colour: " + NAMES[name]));
$("colour").append(...choices);
seen.colour = measures[0] || null;
$("step").append(make("option", { value: "null" }, "all steps"),
  ...steps().map((step) => make("option", { value: String(step) }, `step ${step}`)));
seen.step = (data.rows.findLast(learns) || data.rows[data.rows.length - 1] || {}).step ?? null;
$("step").onchange = () => toStep($("step").value === "null" ? null : Number($("step").value));
$("before").onclick = () => stepBy(-1);
$("after").onclick = () => stepBy(1);
$("colour").onchange = () => { seen.colour = $("colour").value; legend(); detail(); };
$("search").oninput = () => { seen.query = $("search").value; show(); };
$("back").onclick = () => document.body.classList.remove("open");
$("up").onclick = () => move(-1);
$("down").onclick = () => move(1);
$("detail").onscroll = () => { $("tip").hidden = true; };
document.onmouseover = tip;
document.onclick = tip;  // where nothing hovers
document.onkeydown = (event) => {
  const typing = /^(INPUT|SELECT)$/.test(event.target.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const go = { ArrowDown: () => move(1), ArrowUp: () => move(-1), j: () => move(1),
    k: () => move(-1), ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1) }[event.key];
  const scrolls = event.target === $("detail") && event.key.startsWith("Arrow");
  if (go && !scrolls) { event.preventDefault(); go(); }
};
show();
